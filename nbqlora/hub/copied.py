"""A file or folder copied to a file system that is not trusted: read back, compared, and only then given its name.

Network folders and FUSE mounts cut files without a word, fill up late, or are gone between two calls. So a copy is
written under a hidden name, read again from the mount (this machine's own cache of it is dropped first) and compared
by size and SHA-256. Folders are renamed as a whole, or file by file where the mount cannot do that or where an
earlier copy stands; the file that says a folder is whole goes last.

What cannot be known here: a mount that uploads in the background, as Google Drive's, confirms that it has the bytes,
not that the other side has them.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from nbqlora.hub.atomic import hidden_beside, replace_folder, sync
from nbqlora.hub.checkpoint import STATE
from nbqlora.hub.manifest import MANIFEST, WEIGHTS

PIECE_BYTES = 4 << 20
# Synced so often, so that a slow folder is seen to move, and no gigabyte waits in this machine's memory.
SYNC_BYTES = 64 << 20
# What tells that a folder is whole, or what it is for: given its name after all others.
LAST = (WEIGHTS, MANIFEST, STATE)
# A disk that is full or gone refuses single files as it refuses folders.
GONE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.ENOTCONN, errno.EIO, errno.ESTALE, errno.EROFS})

Moved = Callable[[int], None]
CopyFile = Callable[[Path, Path, Moved], str]
NameFolder = Callable[[Path, Path], None]
Keep = Callable[[Path, Path], None]


class DamagedCopyError(OSError):
    """What can be read there is not what was written."""


def copy_file(source: Path, target: Path, moved: Moved) -> str:
    """Copy and sync one file.

    Args:
        moved: told the bytes of each piece as it is written.

    Returns:
        The SHA-256 of what was read from ``source``.
    """
    digest, unsynced = hashlib.sha256(), 0
    with source.open("rb") as reading, target.open("wb", buffering=0) as writing:
        while piece := reading.read(PIECE_BYTES):
            digest.update(piece)
            left = memoryview(piece)
            while left:
                left = left[writing.write(left) :]
            moved(len(piece))
            unsynced += len(piece)
            if unsynced >= SYNC_BYTES:
                os.fsync(writing.fileno())
                unsynced = 0
        os.fsync(writing.fileno())
        # Only advice: what is read back should come from the mount, not from pages that were kept here.
        with suppress(OSError, AttributeError):
            os.posix_fadvise(writing.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return digest.hexdigest()


def copy_checked(
    source: Path,
    target: Path,
    *,
    is_there: Callable[[], bool] = lambda: True,
    moved: Moved = lambda n: None,
    copy: CopyFile = copy_file,
    name_folder: NameFolder = replace_folder,
    keep: Keep = lambda former, new: None,
) -> int:
    """Copy a file or a folder to ``target``, compare, and give it its name; the bytes that were copied.

    Args:
        is_there: the file system of ``target`` is mounted; its mount point exists without it too.
        moved: told the bytes of each piece that was written or read back.
        copy, name_folder: how one file is copied, and how a folder gets the name of another one.
        keep: takes over what is to stay of a folder that is replaced.

    Raises:
        OSError: the file system refused, is gone or is full; of ``target`` single files may have been replaced.
        DamagedCopyError: what it holds is not what was written; nothing of ``target`` was touched.
    """
    files = _files(source)
    n_bytes = sum(f.stat().st_size for f in files)
    _check_there(target, is_there)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_room(target.parent, n_bytes)
    hidden = hidden_beside(target)
    try:
        for file in files:
            _copy_compared(file, hidden / file.relative_to(source) if source.is_dir() else hidden, copy, moved)
        if target.is_dir():
            keep(target, hidden)
        _check_there(target, is_there)
        _give_name(hidden, target, name_folder)
        _check_there(target, is_there)
    finally:
        with suppress(OSError):
            remove_hidden(hidden)
    return n_bytes


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    found = (f for f in source.rglob("*") if f.is_file())
    return sorted(found, key=lambda f: (LAST.index(f.name) + 1 if f.name in LAST else 0, f))


def _check_there(target: Path, is_there: Callable[[], bool]) -> None:
    if not is_there():
        raise OSError(errno.ENOTCONN, "it is no longer mounted", str(target))


def _check_room(folder: Path, n_bytes: int) -> None:
    if shutil.disk_usage(folder).free < n_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def _copy_compared(file: Path, to: Path, copy: CopyFile, moved: Moved) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    _compare(to, file.stat().st_size, copy(file, to, moved), moved)


def _compare(copied: Path, n_bytes: int, digest: str, moved: Moved) -> None:
    size = copied.stat().st_size
    if size != n_bytes:
        raise DamagedCopyError(f"it holds {size} of {n_bytes} bytes of {copied.name}")
    found = hashlib.sha256()
    with copied.open("rb") as reading:
        while piece := reading.read(PIECE_BYTES):
            found.update(piece)
            moved(len(piece))
    if found.hexdigest() != digest:
        raise DamagedCopyError(f"{copied.name} is not there as it was written")


def _give_name(hidden: Path, target: Path, name_folder: NameFolder) -> None:
    if hidden.is_file():
        os.replace(hidden, target)
        sync(target.parent)
        return
    try:
        name_folder(hidden, target)
    except OSError as error:
        if error.errno in GONE:
            raise
        # It renames no folders, or not this one: file by file, what makes a folder whole last.
        for file in _files(hidden):
            to = target / file.relative_to(hidden)
            to.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, to)
        sync(target)


def remove_hidden(hidden: Path) -> None:
    """Remove what a copy left; nothing when it left nothing."""
    if hidden.is_dir():
        shutil.rmtree(hidden, ignore_errors=True)
    else:
        hidden.unlink(missing_ok=True)
