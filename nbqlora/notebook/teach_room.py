"""What a teacher sees of a room without a network: the verdicts that stand in the notebooks that were handed in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from nbqlora.notebook.teach_verdict import SIGNS, State, Table, read_heads


def handed_in(paths: Iterable[str | PathLike[str]]) -> Table:
    """Who passed what, read from saved notebooks; nothing is run.

    A person is the name of a file. An exercise counts as right if any of its checks shows it so.

    Args:
        paths: notebooks, as ``Path("handed-in").glob("*.ipynb")``.

    Returns:
        A row for each file: how many exercises are right, and the sign of each that was tried.
    """
    files = sorted(Path(path) for path in paths)
    return Table(title=f"{len(files)} notebooks", rows=tuple(_row(file) for file in files))


def _row(file: Path) -> tuple[str, str, str]:
    try:
        states = read_heads([text for cell in json.loads(file.read_text("utf-8"))["cells"] for text in _texts(cell)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return file.stem, "cannot be read", f"{type(error).__name__}: {error}"
    return file.stem, f"{[*states.values()].count('right')} right", _signs(states)


def _signs(states: Mapping[str, State]) -> str:
    return "  ".join(f"{SIGNS[state]} {name}" for name, state in states.items())


def _texts(cell: Mapping[str, Any]) -> list[str]:
    """A cell's displayed texts; nbformat keeps text as one string or as lines."""
    found = [output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])]
    return [text if isinstance(text, str) else "".join(text) for text in found]
