"""A real limit on a process's memory, as a container has it: a control group of its own, of either version."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True, kw_only=True)
class Limited:
    """A control group.

    Args:
        folder: its files.
        peak_name: the file that holds the most it ever used.
    """

    folder: Path
    peak_name: str

    def add(self, pid: int) -> None:
        """Let a process live under the limit; what it already holds stays where it was."""
        (self.folder / "cgroup.procs").write_text(str(pid))

    @property
    def peak_bytes(self) -> int:
        """The most that its processes held, page cache included."""
        return int((self.folder / self.peak_name).read_text())


@contextmanager
def memory_limit(limit_bytes: int) -> Iterator[Limited]:
    """A group with this limit and no swap; skips the test where none may be made."""
    try:
        group = _made(limit_bytes)
    except OSError as error:
        pytest.skip(f"no control group may be made here: {error}")
    try:
        yield group
    finally:
        for _ in range(50):  # processes that were killed are still there for a moment
            try:
                group.folder.rmdir()
                break
            except OSError:
                time.sleep(0.1)


def _made(limit_bytes: int) -> Limited:
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = {name: path for _, names, path in lines for name in names.split(",")}
    version = 1 if "memory" in own else 2
    base, inner = (Path("/sys/fs/cgroup/memory"), own["memory"]) if version == 1 else (Path("/sys/fs/cgroup"), own[""])
    folder = base / inner.lstrip("/") / f"nbqlora-test-{os.getpid()}"
    folder.mkdir()
    limit, swap, peak = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.max_usage_in_bytes")
    if version == 2:
        limit, swap, peak = "memory.max", "memory.swap.max", "memory.peak"
    try:
        (folder / limit).write_text(str(limit_bytes))
        if (folder / swap).exists():
            (folder / swap).write_text(str(limit_bytes if version == 1 else 0))
    except OSError:
        folder.rmdir()
        raise
    return Limited(folder=folder, peak_name=peak)
