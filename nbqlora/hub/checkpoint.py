"""Checkpoints on disk: everything that a run needs to go on, in formats that hold no code.

A checkpoint is one folder, ``<output_dir>/checkpoints/step-000123``: the adapter in PEFT's own format (plain
PEFT loads the folder), further tensors as safetensors, and ``state.json`` with all values and with the size
and digest of every other file. It appears by one rename, so a killed write leaves no checkpoint rather than
half of one; a file that was cut or changed later is found by its digest, and the checkpoint before it is
taken.

What the values mean is the business of those who give them: here a step, an identity and two groups of
names are all that is known.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nbqlora.core.errors import ModelError
from nbqlora.hub.atomic import check_room, new_folder, remove_folder, write_json
from nbqlora.hub.save import WEIGHTS, adapter_bytes, sha256, write_adapter

CHECKPOINTS_FOLDER = "checkpoints"
STATE = "state.json"
FORMAT = 1
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
    files: Mapping[str, tuple[int, str]]

    @property
    def n_bytes(self) -> int:
        """Size on disk, without ``state.json``."""
        return sum(size for size, _ in self.files.values())

    def damage(self) -> str:
        """What is wrong with its files, compared with what was written; ``""`` when nothing is."""
        for name, (size, digest) in self.files.items():
            file = self.folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} of {size} bytes"
            if sha256(file) != digest:
                return f"{name} is not what was written"
        return ""

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """The tensors of one group, on the CPU."""
        # Copied, so that nothing keeps hanging on the file.
        return {name: t.clone() for name, t in load_file(self.folder / f"{group}.safetensors").items()}


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
        OSError: the disk refused; nothing is left of the attempt.
    """
    target = root / f"step-{step:06d}"
    root.mkdir(parents=True, exist_ok=True)
    tensors = [t for group in groups.values() for t in group.values()]
    needed = adapter_bytes(model) + sum(t.numel() * t.element_size() for t in tensors) + ROOM_BYTES
    check_room(root, needed, f"the checkpoint of step {step}", "free some room for the next one")
    if target.exists():
        remove_folder(target)
    with new_folder(target) as folder:
        try:
            write_adapter(model, folder, base_name)
            for name, group in groups.items():
                save_file({k: t.contiguous() for k, t in group.items()}, folder / f"{name}.safetensors")
        except SafetensorError as error:
            raise OSError(f"the checkpoint of step {step} cannot be written: {error}") from error
        files = {f.name: (f.stat().st_size, sha256(f)) for f in sorted(folder.iterdir())}
        header = {"format": FORMAT, "step": step, "total_steps": total_steps, "saved_at": time.time()}
        write_json({**header, "identity": identity, "files": files, "state": state}, folder / STATE)
    return _read(target)


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
        except _OtherFormatError as error:
            unreadable.append(f"{folder.name}: {error}")
        except (OSError, ValueError, KeyError, TypeError):
            unreadable.append(f"{folder.name}: {STATE} cannot be read")
    return sorted(found, key=lambda c: (-c.step, -c.saved_at)), sorted(unreadable)


class _OtherFormatError(Exception):
    """A checkpoint of another release."""


def _read(folder: Path) -> Checkpoint:
    value = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if value["format"] != FORMAT:
        raise _OtherFormatError(f"it was written in format {value['format']}, and this release reads {FORMAT}")
    return Checkpoint(
        folder=folder,
        step=int(value["step"]),
        total_steps=int(value["total_steps"]),
        saved_at=float(value["saved_at"]),
        identity=value["identity"],
        state=value["state"],
        files={name: (int(size), str(digest)) for name, (size, digest) in value["files"].items()},
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
        ModelError: the weights are for other modules.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    saved = load_file(folder / WEIGHTS)
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    shapes = [{name: tuple(t.shape) for name, t in weights.items()} for weights in (saved, own)]
    if shapes[0] != shapes[1]:
        other = sorted(set(shapes[0].items()) ^ set(shapes[1].items()))[0][0]
        raise ModelError(f"the adapter in {folder} is not for this model: {other} differs")
    set_peft_model_state_dict(model, saved)
