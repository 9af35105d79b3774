"""Pickles that leave a trace when they are unpickled, and a look at which files are opened at all."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_open_lists: list[list[str]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or not _open_lists or not isinstance(arguments[0], (str, bytes)):
        return
    # Without a mode it is ``os.open``, with which files are synced; whoever reads one gives a mode.
    read = arguments[1] is not None and not set(arguments[1]) & set("wax")
    # The hub of the tests reads what it sends in threads of its own.
    if read and "process_request" not in threading.current_thread().name:
        for names in _open_lists:
            names.append(os.fsdecode(arguments[0]))


_installed: list[bool] = []


@contextmanager
def opened_files() -> Iterator[list[str]]:
    """The files that Python opens within to read them, in whichever library."""
    if not _installed:
        sys.addaudithook(_hook)
        _installed.append(True)
    names: list[str] = []
    _open_lists.append(names)
    try:
        yield names
    finally:
        _open_lists.remove(names)


class Trace:
    """Unpickled, it writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.file, "unpickled"))


def plant(file: Path, trace: Path) -> Path:
    """A file as torch writes it, whose loading leaves ``trace``."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trace(trace)))
        archive.writestr("archive/version", "3\n")
    return file
