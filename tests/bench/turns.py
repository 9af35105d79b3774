"""Processes that load together and step one at a time, so that loading does not cost the card's time.

Each says that it is ready, waits until all are, and then for the one lock; it keeps the lock until it ends, so that the
next one finds the card empty of it. Nothing else runs on the card while one steps.
"""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from typing import IO

_held: list[IO[str]] = []


def my_turn(folder: Path | None, processes: int) -> None:
    """Return when it is this process's turn; at once without a folder.

    Args:
        folder: shared by the processes; empty at the beginning.
        processes: how many there are. One that failed says so with a file ``failed-*`` and is not waited for.
    """
    if folder is None or _held:
        return
    (folder / f"ready-{os.getpid()}").touch()
    while len(list(folder.glob("ready-*"))) + len(list(folder.glob("failed-*"))) < processes:
        time.sleep(0.05)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    _held.append(lock)
