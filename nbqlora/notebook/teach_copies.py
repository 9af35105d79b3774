"""A notebook for the teacher and one for the students, each made from the other.

The teacher's is the one that is written, tested and kept. In the students' copy each solution is an empty place with a
number: of assignments the left side stays (``numbers = ...``), so that a check finds the place empty and not missing.
Cells with the tag ``teacher`` are gone, and so are all outputs. A students' copy whose text was changed meanwhile, in a
course say, becomes a teacher's again with the solutions of the one that it came from.

Notebooks are JSON (nbformat 4), and no library is needed for what is done here.
"""

from __future__ import annotations

import copy
import json
import os
import re
import textwrap
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any

from nbqlora.notebook.teach_errors import LessonError

TAG = "teacher"
_BEGIN, _END = "### BEGIN SOLUTION", "### END SOLUTION"
_PLACE, _PLACE_END = "### YOUR TURN", "### END OF YOUR TURN"
_SOLUTION = re.compile(rf"(?ms)^([ \t]*){_BEGIN}[ \t]*\n(.*?)^[ \t]*{_END}[ \t]*$")
_EMPTY = re.compile(rf"(?ms)^[ \t]*{_PLACE} (\d+)[ \t]*\n.*?^[ \t]*{_PLACE_END}[ \t]*$")
_ASSIGNED = re.compile(r"(?m)^([^\W\d]\w*) *=(?!=)")  # also of a magic: freed = %vram --free
_STRAY = re.compile(rf"{_BEGIN}|{_END}")

Cell = dict[str, Any]


def student_copy(path: str | PathLike[str], target: str | PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the notebook without its solutions, notes and outputs.

    Args:
        path: the teacher's notebook.
        target: the file to write.
        overwrite: replace a file that is there.

    Returns:
        The file that was written.

    Raises:
        LessonError: the notebook cannot be read, a mark has no partner, there is no solution in it, or the target is
            there already.
    """
    notebook = _read(Path(path))
    cells = [copy.deepcopy(cell) for cell in notebook["cells"] if not _is_teachers(cell)]
    numbers = iter(range(1, 1_000_000))
    wrong = []
    for place, cell in enumerate(cells, 1):
        first = _source(cell).strip().split("\n")[0]
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
            _set_source(cell, _without_solutions(_source(cell), numbers))
        if _STRAY.search(_source(cell)):
            wrong.append(f"cell {place}, {first!r}: {_BEGIN} and {_END} belong together, each on a line of a code cell")
    if wrong or next(numbers) == 1:
        raise LessonError("\n  ".join([str(path), *(wrong or [f"has no solution; expected {_BEGIN} ... {_END}"])]))
    return _write(Path(target), {**notebook, "cells": cells}, overwrite)


def teacher_copy(
    path: str | PathLike[str], target: str | PathLike[str], *, solutions: str | PathLike[str], overwrite: bool = False
) -> Path:
    """Write a students' copy with the solutions and notes in it; what was written in an empty place is replaced.

    Args:
        path: a students' copy, whose other text may have changed.
        target: the file to write.
        solutions: the teacher's notebook that the copy was made from.
        overwrite: replace a file that is there.

    Returns:
        The file that was written.

    Raises:
        LessonError: a notebook cannot be read, an empty place lost its marks, or the target is there already.
    """
    notebook, original = _read(Path(path)), _read(Path(solutions))
    known = dict(enumerate(_all_solutions(original), 1))
    cells = copy.deepcopy(notebook["cells"])
    found = set[int]()

    def put_back(match: re.Match[str]) -> str:
        found.add(int(match[1]))
        return known.get(int(match[1]), match[0])

    for cell in cells:
        if cell["cell_type"] == "code":
            _set_source(cell, _EMPTY.sub(put_back, _source(cell)))
    if found != {*known}:
        lost = ", ".join(f"{_PLACE} {n}" for n in sorted({*known} ^ found))
        raise LessonError(f"{path} does not match {solutions}: {lost} stands in one of them only")
    _add_notes(cells, original["cells"])
    return _write(Path(target), {**notebook, "cells": cells}, overwrite)


def _without_solutions(text: str, numbers: Iterator[int]) -> str:
    is_magic = text.lstrip().startswith("%%")

    def empty(match: re.Match[str]) -> str:
        lines = [f"{_PLACE} {next(numbers)}", *_stub(match[2], is_magic), _PLACE_END]
        return "\n".join(match[1] + line for line in lines)

    return _SOLUTION.sub(empty, text)


def _stub(solution: str, is_magic: bool) -> list[str]:
    """What stands in the empty place: the names that are to be set, else a place for any lines."""
    if is_magic:  # not Python: a bare ... would be an error of the cell
        return ["# your lines here"]
    names = dict.fromkeys(_ASSIGNED.findall(textwrap.dedent(solution)))
    return [f"{name} = ...  # your answer" for name in names] or ["...  # your lines here"]


def _all_solutions(notebook: Cell) -> list[str]:
    cells = (c for c in notebook["cells"] if c["cell_type"] == "code" and not _is_teachers(c))
    return [match[0] for cell in cells for match in _SOLUTION.finditer(_source(cell))]


def _add_notes(cells: list[Cell], original: list[Cell]) -> None:
    """Put each of the teacher's cells behind the one that it stood behind; at the top where that one is gone."""
    places = {cell.get("id"): i for i, cell in enumerate(cells) if "id" in cell}
    behind: dict[int, list[Cell]] = {}
    last = -1
    for cell in original:
        if _is_teachers(cell):
            behind.setdefault(last, []).append(copy.deepcopy(cell))
        else:
            last = places.get(cell.get("id"), last)
    for place in sorted(behind, reverse=True):
        cells[place + 1 : place + 1] = behind[place]


def _is_teachers(cell: Cell) -> bool:
    return TAG in cell["metadata"].get("tags", ())


def _source(cell: Cell) -> str:
    return "".join(cell["source"])  # one string, or lines with their ends


def _set_source(cell: Cell, text: str) -> None:
    cell["source"] = text.splitlines(keepends=True)


def _read(path: Path) -> Cell:
    try:
        notebook: Cell = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LessonError(f"{path} cannot be read as a notebook: {error}") from error
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise LessonError(f"{path} is no notebook: expected nbformat 4, JSON with cells")
    return notebook


def _write(target: Path, notebook: Cell, overwrite: bool) -> Path:
    if target.exists() and not overwrite:
        raise LessonError(f"{target} is there already, and may hold somebody's work; give overwrite=True to replace it")
    beside = target.with_name(f".{target.name}.new")
    beside.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    os.replace(beside, target)
    return target
