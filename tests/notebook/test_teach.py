"""Lessons in a real shell: what a student reads for each kind of answer, and what a teacher can rely on."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from nbqlora import teach
from nbqlora.notebook import teach_cells

SETUP = """
from nbqlora import teach
lesson = teach.Lesson("LoRA by numbers", seed=3)
lesson.exercise(
    "numbers", teach.number(9216, mistakes={4608: "that is A alone"}), "A is 8 x 576", "B is 576 x 8",
    because="A and B have as many",
)
lesson.exercise("share", teach.number(lambda: rows[0] / 4, unit="%", within=0.1))
lesson.exercise("letter", teach.choice("b", {"a": "A is not frozen", "C": "neither is C"}))
lesson.exercise("count", teach.gives(((8, 576), 9216), ((1, 2), 4)), "twice r times d")
lesson.exercise("rows", teach.passes("a list", list, ("it has two rows", lambda rows: len(rows) == 2, "add a row")))
"""
RIGHT = """
numbers, letter, rows, share = 9216, "B)", [2, 3], 0.55
def count(r, d):
    return 2 * r * d
for name in ("numbers", "letter", "rows", "share", "count"):
    lesson.check(name)
"""


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("NBQLORA_DISPLAY", "static")
    shell = InteractiveShell.instance()
    assert shell.run_cell(SETUP).success
    yield shell
    InteractiveShell.clear_instance()


def run(shell: Any, cell: str) -> SimpleNamespace:
    """What a cell displayed, as text and as data, and the lines that it printed for an error."""
    with capture_output() as said:
        result = shell.run_cell(cell, store_history=True)
    printed = re.sub(r"\x1b\[[0-9;]*m", "", said.stdout + said.stderr).strip()
    data = [output.data for output in said.outputs]
    return SimpleNamespace(result=result, printed=printed, data=data, text="\n".join(d["text/plain"] for d in data))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (
            "numbers = 4608",
            "you gave  4608\n  expected  a whole number, larger than that\n  try       that is A alone\n",
        ),
        ("numbers = 10_000", "you gave  10000\n  expected  a whole number, smaller than that\n  hint"),
        (
            "numbers = '9216'",
            "expected  a whole number\n  try       it is text: write the number alone, without quotes",
        ),
        (
            "numbers = 9,216",
            "you gave  (9, 216)\n  expected  a whole number\n  try       a comma makes several numbers",
        ),
        ("numbers = True", "try       True and False answer a yes-or-no question"),
        ("numbers = None", "try       None is what print(...) gives back"),
        ("numbers = len", "try       this is a function: call it"),
        ("numbers = float('nan')", "try       this is no finite number"),
        ("numbers = [9216, 9216]", "try       this is of another kind (list)"),
        ("import torch\nnumbers = torch.ones(2)", "try       this is of another kind (Tensor)"),
        ("import numpy\nnumbers = numpy.int64(5)", "a whole number, larger than that"),
        ("letter = 'a'", 'you gave  \'a\'\n  expected  "a", "b" or "c"\n  try       A is not frozen'),
        ("letter = 'x'", "try       write one of them"),
        ("letter = 2", "try       write one of them, with its quotes"),
        ("rows = (1, 2)", "expected  a list\n  try       (1, 2) is of another kind: tuple"),
        ("rows = [1]", "expected  a list: it has two rows\n  try       add a row"),
        ("count = 9216", "expected  a function of 2 values\n  try       define it with def"),
        ("count = lambda r, d: r * d", "expected  9216 for (8, 576)\n  try       for (8, 576) the function gave 4608"),
        ("count = lambda r, d: 9216", "expected  4 for (1, 2)\n  try       for (1, 2) the function gave 9216"),
        ("def count(r, d): 2 * r * d", "you gave  the function count\n  expected  9216 for (8, 576)\n"),
        ("def count(r, d): 2 * r * d", "try       the function gave nothing back: end it with return"),
        ("count = lambda r: r", "the function raised TypeError: <lambda>() takes 1 positional argument"),
        ("share = 3", "try       it could not be checked: NameError: name 'rows' is not defined; were all cells above"),
        (
            "class Odd:\n    def __repr__(self): raise OSError\nletter = Odd()",
            "you gave  a Odd, whose repr raised OSError",
        ),
        ("rows = ['x'] * 99", "you gave  ['x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', 'x', '...\n"),
    ],
)
def test_a_wrong_answer_is_told_what_to_try_and_is_no_error(shell: Any, answer: str, said: str) -> None:
    name = re.findall(r"(?:^|\n)(?:def )?(numbers|letter|rows|count|share)", answer)[-1]
    found = run(shell, f'{answer}\nlesson.check("{name}")\nafterwards = 1')
    assert found.result.success and found.printed == "" and shell.user_ns.pop("afterwards") == 1
    assert found.text.startswith(f"✗ {name}: not yet\n")
    assert said in found.text + "\n"
    assert name not in shell.user_ns["lesson"].passed


def test_right_answers_pass_and_say_why(shell: Any) -> None:
    found = run(shell, RIGHT)
    assert found.text == (
        "✓ numbers: right\n  because   A and B have as many\n"
        "✓ letter: right\n✓ rows: right\n✓ share: right\n✓ count: right"
    )
    assert run(shell, "lesson.finish()").result.success
    assert run(shell, "lesson").printed.endswith("Lesson(LoRA by numbers: 5 of 5 passed)")


def test_cells_run_out_of_order_find_an_open_exercise_and_no_error(shell: Any) -> None:
    missing = run(shell, 'lesson.check("numbers")').text
    assert missing == "· numbers: open\n  expected  a whole number\n  try       run the cell that sets numbers"
    empty = run(shell, 'numbers = ...\nlesson.check("numbers")').text
    assert empty.endswith("try       write your answer in place of ... in numbers = ...")
    run(shell, 'numbers = 9216\nlesson.check("numbers")')
    run(shell, SETUP)  # the first cell once more: what was passed stays passed
    assert shell.user_ns["lesson"].passed == ("numbers",)
    assert run(shell, 'numbers = 1\nlesson.check("numbers")').text.startswith("✗")
    assert shell.user_ns["lesson"].passed == ("numbers",), "tried out afterwards"


def test_hints_come_in_steps(shell: Any) -> None:
    assert 'hint      lesson.hint("numbers"): 2 left' in run(shell, 'numbers = 1\nlesson.check("numbers")').text
    assert run(shell, 'lesson.hint("numbers")').text == "hints for numbers\n  1 of 2  A is 8 x 576"
    assert run(shell, 'lesson.hint("numbers")').text == "hints for numbers\n  2 of 2  B is 576 x 8"
    assert (
        run(shell, 'lesson.hint("numbers")').text == "hints for numbers\n  1 of 2  A is 8 x 576\n  2 of 2  B is 576 x 8"
    )
    assert 'lesson.hint("numbers") shows them again' in run(shell, 'lesson.check("numbers")').text
    assert run(shell, 'lesson.hint("letter")').text == "letter has no hint"
    assert "hint" not in run(shell, 'letter = 1\nlesson.check("letter")').text
    run(shell, "mine = lesson\ndel lesson")
    assert 'mine.hint("count"): 1 left' in run(shell, 'count = 1\nmine.check("count")').text


def test_progress_counts_tries_and_hints(shell: Any) -> None:
    run(shell, 'lesson.check("share")\nnumbers = 1\nlesson.check("numbers")\nlesson.hint("numbers")')
    run(shell, 'numbers = 9216\nlesson.check("numbers")\nletter = "a"\nlesson.check("letter")')
    assert run(shell, "lesson.progress()").text.splitlines() == [
        "LoRA by numbers: 1 of 5 passed",
        "  numbers  ✓ right    2 tries · 1 hint",
        "  share    · open",
        "  letter   ✗ not yet  1 try",
        "  count    · open",
        "  rows     · open",
    ]


@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        ('lesson.check("number")', ["no exercise 'number', did you mean numbers?", "  run the cell that defines"]),
        ('lesson.hint("x")', ["no exercise 'x', expected one of numbers, share, letter, count, rows"]),
        ("letter = 'b'\nlesson.hint(letter)", ['hint takes the name of an exercise in quotes: lesson.hint("letter")']),
        ("lesson.check(5)", ['check takes the name of an exercise in quotes: lesson.check("name")']),
        (
            "numbers = 5\nlesson.check(numbers)",
            ['check takes the name of an exercise in quotes: lesson.check("numbers")'],
        ),
        ('lesson.exercise("two words", teach.number(1))', ["exercise: expected a variable's name in quotes, got 'two"]),
        ('lesson.exercise("x", 5)', ["exercise x: expected teach.number(...), choice, gives or passes, got 5"]),
        ('teach.Lesson("x", seed=-1)', ["seed: expected a whole number from 0 to 2**32 - 1, got -1"]),
    ],
)
def test_misuse_is_a_short_error_with_what_to_write(shell: Any, cell: str, lines: list[str]) -> None:
    found = run(shell, cell)
    assert isinstance(found.result.error_in_exec, teach.LessonError)
    assert found.printed.startswith("LessonError: ") and "Traceback" not in found.printed
    for line, start in zip(found.printed.removeprefix("LessonError: ").splitlines(), lines, strict=False):
        assert line.startswith(start)


def test_an_expectation_whose_mistake_is_right_is_refused() -> None:
    with pytest.raises(ValueError, match="9216 is the right answer"):
        teach.number(9216, mistakes={9216: "no"})
    with pytest.raises(ValueError, match="expected answers other than 'b'"):
        teach.choice("b", {"B": "no"})


def test_the_teacher_s_copy_ends_with_an_error_for_what_was_not_passed(shell: Any) -> None:
    run(shell, RIGHT.replace("9216", "4608"))
    found = run(shell, "lesson.finish()")
    assert isinstance(found.result.error_in_exec, AssertionError)
    assert found.printed == "NotPassedError: LoRA by numbers is not finished\n  numbers: not passed"
    empty = run(shell, 'teach.Lesson("empty").finish()').printed
    assert empty == "NotPassedError: empty is not finished\n  no exercise was defined"


def test_a_cell_that_takes_too_long_fails_the_teacher_s_copy(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run(shell, RIGHT)
    for name in ("monotonic", "process_time"):
        ticks = iter([0.0, 181.0, 200.0, 201.0])
        monkeypatch.setattr(teach_cells, name, lambda ticks=ticks: next(ticks))
    run(shell, "1")
    said = "LoRA by numbers is not finished\n  a cell took 3 min 01 s; expected less than 3 min 00 s"
    assert said in run(shell, "lesson.finish()").printed


def test_each_cell_draws_the_same_in_any_order(shell: Any) -> None:
    cells = ["import random; random.random()", "numpy.random.rand()", "torch.rand(1).item()"]
    shell.user_ns.update(numpy=numpy, torch=torch)
    state = random.getstate(), torch.get_rng_state()
    first = [run(shell, cell).result.result for cell in cells]
    again = [run(shell, cell).result.result for cell in reversed(cells)]
    assert first == again[::-1]
    run(shell, SETUP.replace("seed=3", "seed=4"))
    assert [run(shell, cell).result.result for cell in cells] != first
    random.setstate(state[0])
    torch.set_rng_state(state[1])


def test_a_live_page_gets_small_html_and_a_static_one_text(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = 'numbers = "<b>"\nlesson.check("numbers")\nlesson.progress()'
    assert [{*data} for data in run(shell, check).data] == [{"text/plain"}] * 2
    monkeypatch.setenv("NBQLORA_DISPLAY", "live")
    verdict, progress = (data["text/html"] for data in run(shell, check).data)
    assert 'role="status"' in verdict and 'aria-label="exercise numbers: not yet"' in verdict
    assert '<th scope="row"' in verdict and "&lt;b&gt;" in verdict and "<b>" not in verdict
    assert "<table" in progress and len(verdict) < 2000


def test_what_was_checked_is_not_kept_alive(shell: Any) -> None:
    import gc
    import weakref

    run(shell, 'class Big(list): pass\nrows = Big([1, 2])\nlesson.check("rows")')
    held = weakref.ref(shell.user_ns["rows"])
    run(shell, "del rows")
    gc.collect()
    assert held() is None


def test_without_a_notebook_a_lesson_says_so() -> None:
    InteractiveShell.clear_instance()
    with pytest.raises(teach.LessonError, match="this is none: run it in Jupyter"):
        teach.Lesson("x")
