"""A teacher's notebook and its students' copy: nothing leaks, nothing is lost, and both run under nbval."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

from nbqlora import teach

WORKSHOP = Path(__file__).parents[2] / "notebooks" / "203_workshop.ipynb"
FIRST = """from nbqlora import teach
lesson = teach.Lesson("Two", seed=1)
lesson.exercise("numbers", teach.number(9216, mistakes={4608: "that is A alone"}))
lesson.exercise("count", teach.gives(((8, 576), 9216)))"""
ANSWERS = """# how many numbers?
### BEGIN SOLUTION
SECRET = 576 + 576
numbers = 8 * SECRET
### END SOLUTION
lesson.check("numbers")"""
FUNCTION = """def count(r, d):
    ### BEGIN SOLUTION
    SECRET = 2 * d
    for _ in range(3): pass
    return r * SECRET
    ### END SOLUTION

lesson.check("count")"""
TOML = """%%finetune run1 --plan
model = "demo"
### BEGIN SOLUTION
SECRET = 3
### END SOLUTION"""
MAGIC = """### BEGIN SOLUTION
%vram --who  # SECRET
found = %vram  # SECRET
### END SOLUTION"""
FINISH = ("teacher", "lesson.finish()")


def notebook(*cells: str | tuple[str, str]) -> Any:
    """Code cells, and the teacher's cells as ``("teacher", text)``: code if ``lesson.`` begins it."""
    made = nbformat.v4.new_notebook()
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for cell in cells:
        tag, text = cell if isinstance(cell, tuple) else ("", cell)
        new = nbformat.v4.new_code_cell if not tag or text.startswith("lesson.") else nbformat.v4.new_markdown_cell
        made.cells.append(new(text, metadata={"tags": [tag]} if tag else {}))
    return made


def sources(path: Path) -> list[str]:
    nbformat.validate(nbformat.read(path, 4))
    return [cell.source for cell in nbformat.read(path, 4).cells]


@pytest.fixture
def teachers(tmp_path: Path) -> Path:
    """A teacher's notebook with notes and outputs."""
    made = notebook(
        ("teacher", "SECRET, 5 min"), FIRST, ANSWERS, ("teacher", "SECRET again"), FUNCTION, TOML, MAGIC, FINISH
    )
    made.cells[2].outputs = [nbformat.v4.new_output("stream", text="SECRET")]
    made.cells[2].execution_count = 3
    path = tmp_path / "teacher.ipynb"
    nbformat.write(made, path)
    return path


def test_a_students_copy_has_no_solution_no_note_and_no_output(teachers: Path, tmp_path: Path) -> None:
    path = teach.student_copy(teachers, tmp_path / "student.ipynb")
    assert "SECRET" not in path.read_text().replace("SECRET = ...  # your answer", "")
    first, answers, function, toml, magic = sources(path)
    assert first == FIRST
    assert answers == (
        "# how many numbers?\n### YOUR TURN 1\nSECRET = ...  # your answer\nnumbers = ...  # your answer\n"
        '### END OF YOUR TURN\nlesson.check("numbers")'
    )
    assert function.startswith("def count(r, d):\n    ### YOUR TURN 2\n    SECRET = ...  # your answer\n    ### END OF")
    assert toml.endswith("\n### YOUR TURN 3\n# your lines here\n### END OF YOUR TURN")
    assert magic == "### YOUR TURN 4\nfound = ...  # your answer\n### END OF YOUR TURN"
    assert all(cell.get("outputs", []) == [] for cell in nbformat.read(path, 4).cells)


def test_the_way_back_gives_the_teacher_s_sources(teachers: Path, tmp_path: Path) -> None:
    student = teach.student_copy(teachers, tmp_path / "student.ipynb")
    changed = nbformat.read(student, 4)
    changed.cells[1].source = changed.cells[1].source.replace("# how many", "# so how many").replace("...", "5 * 5")
    changed.cells.insert(3, nbformat.v4.new_code_cell("1 + 1"))
    nbformat.write(changed, student)
    back = teach.teacher_copy(student, tmp_path / "back.ipynb", solutions=teachers)
    expected = sources(teachers)
    expected[2] = expected[2].replace("# how many", "# so how many")
    expected.insert(5, "1 + 1")
    assert sources(back) == expected
    assert [c.id for c in nbformat.read(back, 4).cells if c.metadata.get("tags")] == [
        c.id for c in nbformat.read(teachers, 4).cells if c.metadata.get("tags")
    ]


def test_the_workshop_has_a_students_copy_and_a_way_back(tmp_path: Path) -> None:
    student = teach.student_copy(WORKSHOP, tmp_path / "workshop.ipynb")
    text = student.read_text("utf-8")
    assert "lesson.finish()" not in text and "For the teacher" not in text and 'largest = \\"13B' not in text
    checks = [source for source in sources(student) if "lesson.check(" in source]
    assert len(checks) == 11 and all("### YOUR TURN" in check for check in checks if 'check("smaller")' not in check)
    back = teach.teacher_copy(student, tmp_path / "back.ipynb", solutions=WORKSHOP)
    assert sources(back) == sources(WORKSHOP)


def test_what_cannot_be_copied_is_said(teachers: Path, tmp_path: Path) -> None:
    student = teach.student_copy(teachers, tmp_path / "student.ipynb")
    with pytest.raises(teach.LessonError, match=r"student\.ipynb is there already, and may hold somebody's work"):
        teach.student_copy(teachers, student)
    assert teach.student_copy(teachers, student, overwrite=True) == student
    student.write_text(student.read_text().replace("### YOUR TURN 2", "# mine"))
    with pytest.raises(teach.LessonError, match=r"teacher\.ipynb: ### YOUR TURN 2 stands in one of them only"):
        teach.teacher_copy(student, tmp_path / "back.ipynb", solutions=teachers)
    (tmp_path / "no.ipynb").write_text("[1]")
    with pytest.raises(teach.LessonError, match="is no notebook: expected nbformat 4"):
        teach.student_copy(tmp_path / "no.ipynb", tmp_path / "x.ipynb")
    with pytest.raises(teach.LessonError, match=r"missing\.ipynb cannot be read as a notebook"):
        teach.student_copy(tmp_path / "missing.ipynb", tmp_path / "x.ipynb")
    assert not (tmp_path / "x.ipynb").exists() and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "cell",
    [
        "### BEGIN SOLUTION\nx = 1",
        "x = 1\n### END SOLUTION",
        ANSWERS + "\n### BEGIN SOLUTION",
        "y = 1  ### BEGIN SOLUTION\nx",
    ],
)
def test_a_mark_without_its_partner_never_leaks(cell: str, tmp_path: Path) -> None:
    nbformat.write(notebook(ANSWERS, cell), tmp_path / "teacher.ipynb")
    with pytest.raises(teach.LessonError, match=r"cell 2, '.*BEGIN SOLUTION and ### END SOLUTION belong together"):
        teach.student_copy(tmp_path / "teacher.ipynb", tmp_path / "student.ipynb")
    nbformat.write(notebook(ANSWERS, ("text", ANSWERS)), tmp_path / "teacher.ipynb")
    with pytest.raises(teach.LessonError, match=r"cell 2, '# how many numbers\?'.*of a code cell"):
        teach.student_copy(tmp_path / "teacher.ipynb", tmp_path / "student.ipynb")
    nbformat.write(notebook("x = 1"), tmp_path / "teacher.ipynb")
    with pytest.raises(teach.LessonError, match="has no solution; expected ### BEGIN SOLUTION"):
        teach.student_copy(tmp_path / "teacher.ipynb", tmp_path / "student.ipynb")


def test_open_exercises_pass_a_test_runner_and_wrong_solutions_do_not(tmp_path: Path) -> None:
    """nbval passes the solutions, and a students' copy whose exercises are open; a wrong solution fails at its end."""
    good, wrong = tmp_path / "good.ipynb", tmp_path / "wrong.ipynb"
    nbformat.write(notebook(FIRST, ANSWERS, FUNCTION, FINISH), good)
    nbformat.write(notebook(FIRST, ANSWERS.replace("8 *", "4 *"), FUNCTION, FINISH), wrong)
    student = teach.student_copy(good, tmp_path / "student.ipynb")
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "--nbval-lax", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "NBQLORA_DISPLAY": "static", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    done = subprocess.run(
        [*command, *map(str, (good, student, wrong))], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert "1 failed, 10 passed" in done.stdout, done.stdout + done.stderr
    assert "wrong.ipynb::Cell 3" in done.stdout and "NotPassedError" in done.stdout


def saved(path: Path, *texts: str) -> Path:
    """A notebook whose cells displayed these."""
    made = notebook(*["x"] * len(texts))
    for cell, text in zip(made.cells, texts, strict=True):
        cell.outputs = [nbformat.v4.new_output("display_data", data={"text/plain": text})]
    nbformat.write(made, path)
    return path


def test_a_room_is_read_from_the_notebooks_that_were_handed_in(tmp_path: Path) -> None:
    saved(
        tmp_path / "ada.ipynb", "✓ numbers: right\n  because   x", "✗ count: not yet\n  you gave  3", "ram  something"
    )
    saved(tmp_path / "bob.ipynb", "✓ numbers: right", "✗ numbers: not yet", "· count: open")
    saved(tmp_path / "cy.ipynb", "said ✓ numbers: right")
    (tmp_path / "dee.ipynb").write_text("{")
    (tmp_path / "eve.ipynb").write_text(json.dumps({"cells": [3]}))
    lines = str(teach.handed_in(tmp_path.glob("*.ipynb"))).splitlines()
    assert lines[:4] == [
        "5 notebooks",
        "  ada  1 right         ✓ numbers  ✗ count",
        "  bob  1 right         ✓ numbers  · count",
        "  cy   0 right",
    ]
    assert lines[4].startswith("  dee  cannot be read  JSONDecodeError: Expecting")
    assert lines[-1] == "  eve  cannot be read  AttributeError: 'int' object has no attribute 'get'"
