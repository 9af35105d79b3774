"""File systems of their own for tests, on tmpfs: small ones, full ones, and ones that are gone in the middle."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def mount(folder: Path, size: str = "64m") -> None:
    """Mount a new, empty file system; skips the test where that is not permitted."""
    _mount(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


def show_at(folder: Path, source: Path) -> None:
    """Let a folder of another file system appear at ``folder``, to be taken away and shown again with its files."""
    _mount(folder, "--bind", str(source))


def _mount(folder: Path, *arguments: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this system has no mount")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")


def unmount(folder: Path) -> None:
    """Take it away, whoever uses it; nothing when it is not there."""
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@contextmanager
def mounted(folder: Path, size: str = "64m") -> Iterator[Path]:
    """A file system at ``folder`` while the block runs."""
    mount(folder, size)
    try:
        yield folder
    finally:
        unmount(folder)
