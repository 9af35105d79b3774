"""A folder for one data set's tokens, which is gone when nobody needs it, also after a killed process.

Tokens do not fit into memory for large data, and what data workers open must have a name. Each folder holds a
file that its process keeps locked; a folder whose lock is free belongs to a process that was killed, and the
next run removes it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import suppress
from pathlib import Path

PREFIX = "nbqlora-tokens-"
_LOCK = "lock"


class ScratchFolder:
    """A temporary folder, removed with this object or at the end of the process."""

    def __init__(self) -> None:
        _remove_abandoned()
        # Another process that begins now must not see it before it is locked.
        made = Path(tempfile.mkdtemp(prefix=f"new-{PREFIX}"))
        self._n_files = 0
        self._lock = os.open(made / _LOCK, os.O_CREAT | os.O_RDWR)
        _try_lock(self._lock)
        self.path = made.rename(made.with_name(made.name.removeprefix("new-")))
        self._finalizer = weakref.finalize(self, _remove, str(self.path), self._lock, os.getpid())

    def new_file(self, name: str) -> Path:
        """A path in it that no file has yet: ``rows-1.arrow``, ``packs-2.arrow``."""
        self._n_files += 1
        return self.path / f"{name}-{self._n_files}.arrow"

    def remove(self) -> None:
        """Remove it now."""
        self._finalizer()

    def __repr__(self) -> str:
        return f"ScratchFolder({self.path})"


def _remove(path: str, lock: int, owner: int) -> None:
    # A forked child runs the exit handlers of its parent, whose folder this is.
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        # Somebody else's, or being removed at this moment.
        with suppress(OSError):
            lock = os.open(folder / _LOCK, os.O_RDWR)
            try:
                if _try_lock(lock):
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def _try_lock(lock: int) -> bool:
    """Lock the file; False where another process has it, or where this system has no such locks."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
