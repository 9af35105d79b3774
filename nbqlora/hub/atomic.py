"""Files and folders that are whole or not there: written beside under a hidden name, synced, renamed.

A rename within one folder is the only step that a killed process or a power cut cannot split. What a killed
write leaves behind begins with :data:`HIDDEN` and is removed at the next start.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nbqlora.core.errors import OutOfDiskError
from nbqlora.core.units import format_bytes

HIDDEN = ".saving-"


def hidden_beside(target: Path) -> Path:
    """A name next to ``target`` that nothing else uses."""
    return target.parent / f"{HIDDEN}{target.name}-{secrets.token_hex(4)}"


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden folder to fill, which becomes ``target`` when the block ends and is removed when it raises.

    Raises:
        OSError: the disk refused, or ``target`` is there already; nothing of it was touched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            sync(file)
        sync(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: it is renamed first, so that no half of it is ever seen under its name."""
    hidden = hidden_beside(folder)
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that were killed left in this folder."""
    for left in folder.glob(f"{HIDDEN}*"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def save_json(value: Mapping[str, Any], path: Path) -> None:
    """Write JSON beside, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(path)
    try:
        write_json(value, temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_json(value: Mapping[str, Any], path: Path) -> None:
    """JSON as every program reads it: a number that is not finite is a ``ValueError``, not a word of its own."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def check_room(folder: Path, needed_bytes: int, what: str, advice: str) -> None:
    """Raise :class:`OutOfDiskError` when the disk of ``folder`` has less room than ``what`` needs."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise OutOfDiskError(
            f"{what} needs {format_bytes(needed_bytes)} and {folder} has {format_bytes(free)} free; {advice}"
        )


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
