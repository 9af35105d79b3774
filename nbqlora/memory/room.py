"""Whether RAM and disk have room for what a run roughly needs, before it is known which model it is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from nbqlora.core.doctor import Check
from nbqlora.core.units import GIB, format_bytes
from nbqlora.memory.host import disk_free_bytes, read_host

# The libraries take 0.6 GiB, the demo model in NF4 1.3 in all, measured on a CPU.
RAM_BYTES = 2 * GIB
# Adapter and optimizer state of rank 16 on 8B: 0.5 GiB a checkpoint; two are kept while one is written.
OUTPUT_BYTES = 2 * GIB
# A 1B model is 2.5 GB to download, one of 8B 16 GB.
DOWNLOAD_BYTES = 5 * GIB


def ram_check() -> Check:
    """RAM that this process may still take."""
    host = read_host()
    found = f"{format_bytes(host.free_bytes)} of {format_bytes(host.total_bytes)} free"
    if host.notes:
        found += f" ({'; '.join(host.notes)})"
    if host.free_bytes >= RAM_BYTES:
        return Check(name="RAM", status="ok", found=found)
    advice = f"even the demo takes {format_bytes(1.5 * GIB)}; end other programs, or restart the kernel"
    return Check(name="RAM", status="warning", found=found, advice=advice)


def disk_check(name: str, folder: Path, *, needed_bytes: float, needed_for: str, move: str) -> Check:
    """A disk has room, and may be written.

    Args:
        name: the row's label.
        folder: it need not exist yet.
        needed_bytes: with less, it is a warning.
        needed_for: what the room is for ("checkpoints of an 8B model").
        move: how to use another disk.
    """
    if reason := not_writable(folder):
        return Check(name=name, status="problem", found=reason, advice=move)
    free, total = disk_free_bytes(folder), shutil.disk_usage(existing(folder)).total
    found = f"{format_bytes(free)} of {format_bytes(total)} free for {shown(folder)}"
    if free >= needed_bytes:
        return Check(name=name, status="ok", found=found)
    return Check(name=name, status="warning", found=f"{found}; {needed_for} take about {format_bytes(needed_bytes)}",
                 advice=move)  # fmt: skip


def not_writable(folder: Path) -> str:
    """Why nothing can be written there; "" when it can."""
    nearest = existing(folder)
    if not nearest.is_dir():
        return f"{shown(folder)} cannot be made: {shown(nearest)} is a file"
    return "" if os.access(nearest, os.W_OK | os.X_OK) else f"{shown(nearest)} may not be written"


def existing(folder: Path) -> Path:
    """``folder`` itself, or the nearest one above it that exists."""
    found = folder.absolute()
    while not found.exists():
        found = found.parent
    return found


def shown(path: Path) -> str:
    """The path, with the home folder as ``~``."""
    home = str(Path.home())
    text = str(path)
    return text.replace(home, "~", 1) if text == home or text.startswith(home + os.sep) else text
