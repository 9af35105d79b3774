"""What a merge notes as it goes: what it is made from, which shards are whole, at the end what every file should be.

One file in the folder that is being made, and afterwards in the merged model's: a merge that goes on compares the
former's identity with its own, and whoever doubts a merged model compares its files with the list.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nbqlora.hub.atomic import remove_leftovers, save_json
from nbqlora.hub.merged import MergedModel
from nbqlora.hub.sealed import sha256
from nbqlora.hub.shards import Written

MANIFEST = "nbqlora_merge.json"
FORMAT = 1
_MARK_BYTES = 1 << 16


def identity_of(
    model: MergedModel, base_files: Iterable[Path], adapters: Iterable[Path], **settings: Any
) -> dict[str, Any]:
    """What decides every byte of a merge: two merges that agree in it write the same files.

    Args:
        base_files: the base's files; told apart by name, size, and their beginning and end, since all of them may be
            150 GB.
        adapters: files, told apart by their digest.
        settings: dtype and the like, plain values.
    """
    return {
        "format": FORMAT,
        "base": {file.name: _mark(file) for file in base_files},
        "config": hashlib.sha256(json.dumps(model.config, sort_keys=True).encode()).hexdigest(),
        "adapters": [sha256(file) for file in adapters],
        **settings,
    }


def _mark(file: Path) -> list[Any]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_MARK_BYTES))
        opened.seek(max(0, size - _MARK_BYTES))
        digest.update(opened.read(_MARK_BYTES))
    return [size, digest.hexdigest()]


def damage(folder: Path) -> str:
    """What is wrong with a merged model's files, compared with its manifest; ``""`` when nothing is."""
    try:
        files = _read(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or cannot be read"
    for name, (size, digest) in files.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
        if sha256(file) != digest:
            return f"{name} is not what was written"
    return ""


def _read(folder: Path) -> dict[str, Any]:
    value = json.loads((folder / MANIFEST).read_text("utf-8"))
    return value if isinstance(value, dict) else {}


def is_finished(target: Path, identity: Mapping[str, Any]) -> bool:
    """The same merge is there, whole, from an earlier call."""
    return _journal(target).get("identity") == identity and not damage(target)


def _journal(folder: Path) -> dict[str, Any]:
    try:
        return _read(folder)
    except (OSError, ValueError):
        return {}


def begin(work: Path, identity: Mapping[str, Any]) -> dict[str, Written]:
    """Make the work folder, or take one over: the shards in it that are this merge's and whole."""
    journal = _journal(work)
    if work.exists() and journal.get("identity") != identity:
        shutil.rmtree(work)
    work.mkdir(parents=True, exist_ok=True)
    remove_leftovers(work)
    if journal.get("identity") != identity:
        return {}
    found = {name: Written(**each) for name, each in journal["shards"].items()}
    return {name: w for name, w in found.items() if _is_whole(work / name, w)}


def _is_whole(file: Path, written: Written) -> bool:
    return file.is_file() and file.stat().st_size == written.n_bytes and sha256(file) == written.sha256


def note(work: Path, identity: Mapping[str, Any], written: Mapping[str, Written], **more: Any) -> None:
    """Write down which shards are whole."""
    shards = {name: asdict(w) for name, w in written.items()}
    save_json({"identity": identity, "shards": shards, **more}, work / MANIFEST)
