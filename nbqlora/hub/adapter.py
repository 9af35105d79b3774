"""An adapter that is about to be used: whole, or an error that says what is wrong with it and where a whole one is.

Beside the adapter's folder a run keeps its checkpoints, and each of them holds an adapter in the same format. The last
one is usually the very same: the digest of its weights tells.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nbqlora.core.errors import ModelError
from nbqlora.hub.atomic import recover_folder
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, Checkpoint, find_checkpoints, first_whole
from nbqlora.hub.manifest import CONFIG, MANIFEST, WEIGHTS, adapter_damage, read_manifest
from nbqlora.hub.sealed import FileFacts


@dataclass(frozen=True, kw_only=True)
class WholeAdapter:
    """An adapter that can be used.

    Args:
        note: what is wrong with the one that was asked for, and what this one is; "" when it is that one.
    """

    folder: Path
    note: str = ""


def check_adapter(folder: Path) -> None:
    """Raise :class:`ModelError` when an adapter is damaged, is none, or would be read from a pickle."""
    damage = adapter_damage(folder)
    if damage:
        raise ModelError(f"the adapter in {folder} cannot be used: {damage}; {_advice(folder, damage)}")


def whole_adapter(folder: Path) -> WholeAdapter:
    """The adapter in ``folder``, or where it is damaged the one of the run's furthest whole checkpoint.

    Raises:
        ModelError: it is damaged, and there is no whole checkpoint.
    """
    recover_folder(folder)
    damage = adapter_damage(folder)
    if not damage:
        return WholeAdapter(folder=folder)
    other = _beside(folder)
    if other is None:
        check_adapter(folder)
    assert other is not None
    note = f"the adapter in {folder} cannot be used: {damage}; using {_named(folder, other)}"
    return WholeAdapter(folder=other.folder, note=note)


def _beside(folder: Path) -> Checkpoint | None:
    """The furthest whole checkpoint of the run that saved this adapter; first of all one with the same weights."""
    found, _ = find_checkpoints(folder.parent / CHECKPOINTS_FOLDER)
    wanted = _listed(folder).get(WEIGHTS)
    return first_whole(sorted(found, key=lambda c: c.files[WEIGHTS] != wanted))[0]


def _listed(folder: Path) -> FileFacts:
    try:
        manifest = read_manifest(folder)
    except ValueError:
        manifest = None
    return manifest.files if manifest else {}


def _named(folder: Path, checkpoint: Checkpoint) -> str:
    if checkpoint.files[WEIGHTS] == _listed(folder).get(WEIGHTS):
        return f"the same one in {checkpoint.folder}"
    return f"the one after step {checkpoint.step} of {checkpoint.total_steps} in {checkpoint.folder}"


def _advice(folder: Path, damage: str) -> str:
    changed = damage.startswith((f"{CONFIG} has", f"{CONFIG} is not what"))
    own = f"if you changed it yourself, remove {MANIFEST}; " if changed and _listed(folder) else ""
    other = _beside(folder)
    if other is not None:
        return f"{own}{_named(folder, other)} is whole"
    return f"{own}copy it again from where it is whole, or train again"
