"""Checkpoints on disk: everything that a run needs to go on, in formats that hold no code.

A checkpoint is one folder, ``<output_dir>/checkpoints/step-000123``: the adapter in PEFT's own format (plain
PEFT loads the folder), further tensors as safetensors, and ``state.json`` with all values, with the size
and digest of every other file, and with a digest of itself. It appears by one rename, so a killed write leaves no
checkpoint rather than half of one; a file that was cut or changed later is found by its digest, and the checkpoint
before it is taken. What else lies in the folder is never opened.

What the values mean is the business of those who give them: here a step, an identity and two groups of
names are all that is known.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nbqlora.core.errors import DiskError, ModelError
from nbqlora.hub.atomic import check_room, new_folder, remove_folder, write_json
from nbqlora.hub.manifest import CONFIG, WEIGHTS
from nbqlora.hub.refused import disk_errors
from nbqlora.hub.save import adapter_bytes, write_adapter
from nbqlora.hub.sealed import FileFacts, OtherFormatError, file_facts, first_damage, read_facts, read_sealed, sealed
from nbqlora.hub.stored import StoredTensors

CHECKPOINTS_FOLDER = "checkpoints"
STATE = "state.json"
# 2: state.json tells its own damage, and the optimizer's states are kept by parameter.
FORMAT = 2
# For the small files, and so that a checkpoint does not take the last block of a disk.
ROOM_BYTES = 16 << 20

Tensors = Mapping[str, torch.Tensor]
Identity = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, its tensors not yet read.

    Args:
        step: optimizer steps done.
        total_steps: of the whole run.
        saved_at: seconds since the epoch.
        identity: what makes it the same run.
        state: the values that were given.
        files: size in bytes and digest of each file beside ``state.json``.
    """

    folder: Path
    step: int
    total_steps: int
    saved_at: float
    identity: Identity
    state: Mapping[str, Any]
    files: FileFacts

    @property
    def n_bytes(self) -> int:
        """Size on disk, without ``state.json``."""
        return sum(size for size, _ in self.files.values())

    def damage(self) -> str:
        """What is wrong with its files, compared with what was written; ``""`` when nothing is."""
        return first_damage(self.folder, self.files)

    def tensors(self, group: str) -> Tensors:
        """The tensors of one group, on the CPU; each is read when it is asked for, and not kept.

        Raises:
            ModelError: the file is gone or was cut, here or when a tensor is read.
        """
        return _FileTensors(self.folder / f"{group}.safetensors")


class _FileTensors(Mapping[str, torch.Tensor]):
    """Tensors of a file, in memory of their own."""

    def __init__(self, file: Path) -> None:
        self._stored = StoredTensors([file])

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


def write_checkpoint(
    root: Path,
    *,
    model: Any,
    base_name: str,
    step: int,
    total_steps: int,
    identity: Identity,
    groups: Mapping[str, Tensors],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Write ``root/step-<step>``, whole and synced before it has its name.

    Args:
        model: a ``PeftModel``.
        base_name: what ``adapter_config.json`` names as the base.
        groups: tensors by file and name; no two of them share memory.
        state: plain JSON values; every number finite.

    Raises:
        OutOfDiskError: there is too little room; nothing was touched.
        DiskError: the disk refused; nothing is left of the attempt, and a former checkpoint of this step is whole.
    """
    target = root / f"step-{step:06d}"
    what, advice = f"the checkpoint of step {step}", "free some room for the next one"
    with disk_errors(f"{what} cannot be written", advice):
        root.mkdir(parents=True, exist_ok=True)
        tensors = [t for group in groups.values() for t in group.values()]
        needed = adapter_bytes(model) + sum(t.numel() * t.element_size() for t in tensors) + ROOM_BYTES
        check_room(root, needed, what, advice)
        with new_folder(target, replace=True) as folder:
            write_adapter(model, folder, base_name)
            for name, group in groups.items():
                save_file({k: t.contiguous() for k, t in group.items()}, folder / f"{name}.safetensors")
            files = file_facts(sorted(folder.iterdir()))
            header = {"step": step, "total_steps": total_steps, "saved_at": time.time()}
            value = {**header, "identity": identity, "files": files, "state": state}
            write_json(sealed(value, form=FORMAT), folder / STATE)
        return _read_back(target)


def _read_back(folder: Path) -> Checkpoint:
    try:
        return _read(folder)
    except ValueError as error:
        raise DiskError(f"{folder} does not give back what was written to it: {error}") from error


def find_checkpoints(root: Path) -> tuple[list[Checkpoint], list[str]]:
    """The checkpoints in a folder, the furthest first, and a line for each whose ``state.json`` cannot be read.

    Their other files are not looked at: that is :meth:`Checkpoint.damage`.
    """
    found, unreadable = [], []
    for folder in root.glob("step-*"):
        try:
            found.append(_read(folder))
        except FileNotFoundError:
            unreadable.append(f"{folder.name}: it has no {STATE}")
        except OtherFormatError as error:
            unreadable.append(f"{folder.name}: {error}")
        except (OSError, ValueError, KeyError, TypeError, OverflowError):
            unreadable.append(f"{folder.name}: {STATE} cannot be read")
    return sorted(found, key=lambda c: (-c.step, -c.saved_at)), sorted(unreadable)


def first_whole(checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint | None, dict[Path, str]]:
    """The first one without damage, and the folders before it with what is wrong with each."""
    passed: dict[Path, str] = {}
    for checkpoint in checkpoints:
        damage = checkpoint.damage()
        if not damage:
            return checkpoint, passed
        passed[checkpoint.folder] = f"{checkpoint.folder.name}: {damage}"
    return None, passed


def _read(folder: Path) -> Checkpoint:
    value = read_sealed(folder / STATE, form=FORMAT)
    files = read_facts(value["files"])
    if not {CONFIG, WEIGHTS} <= files.keys():
        raise ValueError("it lists no adapter")
    return Checkpoint(
        folder=folder,
        step=int(value["step"]),
        total_steps=int(value["total_steps"]),
        saved_at=float(value["saved_at"]),
        identity=value["identity"],
        state=value["state"],
        files=files,
    )


def prune_checkpoints(root: Path, *, keep: int, is_own: Callable[[Checkpoint], bool]) -> None:
    """Keep the last ``keep`` of a run's own checkpoints by time of writing, and the furthest; remove all others.

    Args:
        is_own: tells those of this run; of another run none stays, nor any that cannot be read.
    """
    found, _ = find_checkpoints(root)
    own = [c for c in found if is_own(c)]
    kept = {c.folder for c in [*own[:1], *sorted(own, key=lambda c: -c.saved_at)[:keep]]}
    for folder in root.glob("step-*"):
        if folder not in kept:
            remove_folder(folder)


def load_adapter_weights(model: Any, folder: Path) -> None:
    """Put a checkpoint's adapter on a model that has fresh adapters of the same shape.

    Raises:
        ModelError: the weights cannot be read, or are for other modules.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = {name: stored.read() for name, stored in StoredTensors([folder / WEIGHTS]).items()}
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = [{name: tuple(t.shape) for name, t in weights.items()} for weights in (saved, own)]
    if shapes[0] != shapes[1]:
        other = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ModelError(f"the adapter in {folder} is not for this model: {other} differs")
    set_peft_model_state_dict(model, saved)
