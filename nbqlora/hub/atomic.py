"""Files and folders that are whole or not there: written beside under a hidden name, synced, renamed.

A rename within one folder is the only step that a killed process or a power cut cannot split. What a killed
write leaves behind begins with :data:`HIDDEN` and is removed at the next start.

A folder that takes the place of another one needs two names to change at once. Linux swaps them in one step
(``renameat2`` with ``RENAME_EXCHANGE``); on file systems that refuse (FUSE, among them a mounted Drive) the former
folder steps aside under a hidden name that its own tells, so that a kill between the two renames leaves it whole:
:func:`recover_folder` puts it back, and :func:`remove_leftovers` does so before it removes anything.
"""

from __future__ import annotations

import ctypes
import errno
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
# Behind the name of a folder that stepped aside; other hidden names end in eight hex digits.
FORMER = "-former"
# What file systems and kernels say that cannot swap two names, and those that cannot sync a folder's list of names.
UNABLE = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})
NO_FOLDER_SYNC = UNABLE | {errno.EBADF, errno.EISDIR, errno.EACCES}
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def hidden_beside(target: Path) -> Path:
    """A name next to ``target`` that nothing else uses."""
    return target.parent / f"{HIDDEN}{target.name}-{secrets.token_hex(4)}"


@contextmanager
def new_folder(target: Path, *, replace: bool = False) -> Iterator[Path]:
    """A hidden folder to fill, which becomes ``target`` when the block ends and is removed when it raises.

    Args:
        replace: a folder that is there is replaced, as :func:`replace_folder` does; a link to one is followed.

    Raises:
        OSError: the disk refused, or ``target`` is there already and not to be replaced; nothing of it was touched.
    """
    if replace and target.is_symlink():
        target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if not file.is_symlink():
                sync(file)
        sync(temporary)
        if replace:
            replace_folder(temporary, target)
        else:
            os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(target.parent)


def replace_folder(new: Path, target: Path, *, swap: bool = True) -> None:
    """Give a filled, synced folder the name of another one, which is removed.

    A kill at any moment leaves the one or the other whole under the name; without a swap, for the moment between
    two renames, the former one under its hidden name (:func:`recover_folder`).

    Args:
        new: beside ``target``.
        target: a folder, or nothing yet.
        swap: try to change both names in one step; False as on a file system that cannot.

    Raises:
        OSError: the disk refused; ``target`` is what it was, or the new one, whole.
    """
    recover_folder(target)
    if not os.path.lexists(target):
        os.rename(new, target)
    elif target.is_symlink() or not target.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "is no folder", str(target))
    elif swap and swapped(new, target):
        # Before anything is removed: after a power cut the names may be the former ones, and their files not there.
        sync(target.parent)
        shutil.rmtree(new, ignore_errors=True)
    else:
        _step_aside(new, target)
    sync(target.parent)


def recover_folder(target: Path) -> None:
    """Put back the folder that a killed :func:`replace_folder` left aside, when nothing has its name."""
    aside = _aside(target)
    if aside.is_dir() and not os.path.lexists(target):
        os.rename(aside, target)


def _step_aside(new: Path, target: Path) -> None:
    aside = _aside(target)
    if os.path.lexists(aside):
        remove_folder(aside)
    os.rename(target, aside)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(aside, target)
        raise
    sync(target.parent)
    # It gets another name first: half of it must never be put back.
    remove_folder(aside)


def _aside(target: Path) -> Path:
    return target.parent / f"{HIDDEN}{target.name}{FORMER}"


def swapped(one: Path, other: Path) -> bool:
    """Swap two names in one step; False, with nothing done, where the system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def remove_folder(folder: Path) -> None:
    """Remove a folder at once: it is renamed first, so that no half of it is ever seen under its name."""
    hidden = hidden_beside(folder)
    os.rename(folder, hidden)
    _remove(hidden)


def remove_leftovers(folder: Path) -> None:
    """Remove what writes that were killed left in this folder; what one of them left aside is put back first."""
    for left in folder.glob(f"{HIDDEN}*{FORMER}"):
        recover_folder(folder / left.name.removeprefix(HIDDEN).removesuffix(FORMER))
    for left in folder.glob(f"{HIDDEN}*"):
        _remove(left)


def _remove(path: Path) -> None:
    """Remove a file, a link or a folder; of a folder that cannot be emptied the rest stays, for the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


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
    """Wait until a file, or a folder's list of names, is on the disk.

    A file system that has no such wait for folders keeps their names in its own way: that is no error.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC or not path.is_dir():
            raise
