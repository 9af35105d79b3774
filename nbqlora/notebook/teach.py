"""``nbqlora.teach``: exercises in a notebook that answer at once, kindly, for a room of people at their own machines.

**A wrong answer is no error.** ``lesson.check("name")`` says what was given, what was expected and what to try, and
lets the notebook go on: a traceback frightens, and *Run all* would end at the first exercise. So a check could never
fail a test of the notebook. The teacher's copy therefore ends with ``lesson.finish()``, which raises unless every
exercise was passed, and unless each cell took less than three minutes. Its cell has the tag ``teacher``, so that
:func:`student_copy` leaves it out as it takes the answers out, and no student ever meets it.

**An exercise has the name of the variable that holds its answer.** So a check knows whether the answer is missing,
still the empty place (``...``) or there, in whatever order cells were run; a cell left out is no ``NameError``.
The exercises are defined in one cell at the top; that cell can be run again, and what was passed stays passed. Misuse
(a name that does not exist, a name without quotes) is a short error with what to write instead.

**The same for everyone.** Random numbers are seeded before each cell, so that a cell draws the same on 25 machines, in
any order, however often it is run. The model can come from one folder for all, which nobody needs to write to
(``NBQLORA_CACHE``).

**What a teacher sees** is on the screens (``lesson.progress()``) and in the notebooks that were handed in
(:func:`handed_in`). Nothing is sent and no file is written. The cell with the exercises can be opened by anyone, who
finds the answers there: this is for learning, not for an exam.

In a teacher's notebook an answer stands between ``### BEGIN SOLUTION`` and ``### END SOLUTION`` (the marks that
nbgrader has), and cells for the teacher alone, notes and the last one, have the tag ``teacher``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any
from weakref import WeakKeyDictionary

from IPython import get_ipython
from IPython.display import display

from nbqlora.core.display import Displayed, is_static
from nbqlora.core.units import format_seconds
from nbqlora.notebook.teach_answers import Expectation, Finding, choice, gives, number, passes
from nbqlora.notebook.teach_cells import Cells
from nbqlora.notebook.teach_copies import student_copy, teacher_copy
from nbqlora.notebook.teach_errors import LessonError, NotPassedError
from nbqlora.notebook.teach_room import handed_in
from nbqlora.notebook.teach_verdict import SIGNS, State, Table, Verdict, judge

__all__ = [
    "Expectation", "Finding", "Lesson", "LessonError", "NotPassedError", "choice", "gives", "handed_in", "number",
    "passes", "student_copy", "teacher_copy",
]  # fmt: skip

CELL_SECONDS = 180.0


@dataclass(frozen=True, kw_only=True)
class _Exercise:
    expectation: Expectation
    hints: tuple[str, ...]
    because: str


@dataclass
class _Marks:
    """What happened at one exercise, in this kernel."""

    passed: bool = False
    tries: int = 0
    hints: int = 0


@dataclass
class _Desk:
    """What a shell keeps when the cell that makes a lesson is run again."""

    cells: Cells
    marks: dict[str, dict[str, _Marks]] = field(default_factory=dict)


_desks: WeakKeyDictionary[Any, _Desk] = WeakKeyDictionary()


class Lesson:
    """A notebook's exercises.

    Args:
        title: shown above the progress; a lesson that is made again under its title goes on with what was passed.
        seed: of ``random``, and of numpy and torch once they are imported, before each cell; 0 to 2**32 - 1.

    Raises:
        LessonError: there is no notebook here, or the seed cannot be one.

    Example:
        >>> lesson = nbqlora.teach.Lesson("LoRA by numbers", seed=7)
        >>> lesson.exercise("numbers", nbqlora.teach.number(9216), "A has 8 x 576 of them", because="B has as many")
        >>> numbers = 8 * 576
        >>> lesson.check("numbers")
        ✗ numbers: not yet
          you gave  4608
          expected  a whole number, larger than that
          hint      lesson.hint("numbers"): 1 left
    """

    def __init__(self, title: str, *, seed: int = 0) -> None:
        shell = get_ipython()
        if shell is None:
            raise LessonError("a lesson reads a notebook's variables, and this is none: run it in Jupyter or IPython")
        if not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise LessonError(f"seed: expected a whole number from 0 to 2**32 - 1, got {seed!r}")
        self.title, self._shell = title, shell
        self._exercises: dict[str, _Exercise] = {}
        if shell not in _desks:
            _desks[shell] = _Desk(cells=Cells(shell))
        self._cells = _desks[shell].cells
        self._cells.begin(seed)
        self._marks = _desks[shell].marks.setdefault(title, {})

    def __repr__(self) -> str:
        return f"Lesson({self.title}: {len(self.passed)} of {len(self._exercises)} passed)"

    @property
    def passed(self) -> tuple[str, ...]:
        """Exercises whose check found a right answer, once at least."""
        return tuple(name for name in self._exercises if self._of(name).passed)

    def exercise(self, name: str, expectation: Expectation, *hints: str, because: str = "") -> None:
        """Define an exercise; an earlier one with this name is replaced.

        Args:
            name: the variable that will hold the answer.
            expectation: :func:`number`, :func:`choice`, :func:`gives`, :func:`passes`, or one of your own.
            *hints: from a nudge to nearly the answer; :meth:`hint` shows one more at each call.
            because: said when the answer is right.

        Raises:
            LessonError: the name cannot be a variable's, or the expectation is a bare value.
        """
        if not isinstance(name, str) or not name.isidentifier():
            raise LessonError(f"exercise: expected a variable's name in quotes, got {name!r}")
        if not isinstance(expectation, Expectation):
            given = f"expected teach.number(...), choice, gives or passes, got {expectation!r}"
            raise LessonError(f"exercise {name}: {given}")
        self._exercises[name] = _Exercise(expectation=expectation, hints=hints, because=because)

    def check(self, name: str) -> None:
        """Show what is to be said about an answer; a wrong one is no error.

        Raises:
            LessonError: there is no such exercise.
        """
        exercise, marks = self._find(name, "check"), self._of(name)
        verdict = judge(name, exercise.expectation, self._shell.user_ns, because=exercise.because)
        marks.passed = marks.passed or verdict.state == "right"
        marks.tries += verdict.state != "open"
        _show(self._with_hint(name, verdict))

    def hint(self, name: str) -> None:
        """Show one hint more; behind the last one, all of them again.

        Raises:
            LessonError: there is no such exercise.
        """
        hints, marks = self._find(name, "hint").hints, self._of(name)
        first = 0 if marks.hints == len(hints) else marks.hints
        marks.hints = min(marks.hints + 1, len(hints))
        rows = tuple((f"{i + 1} of {len(hints)}", hints[i], "") for i in range(first, marks.hints))
        _show(Table(title=f"hints for {name}" if hints else f"{name} has no hint", rows=rows))

    def progress(self) -> None:
        """Show which exercises were passed, after how many tries and hints."""
        title = f"{self.title}: {len(self.passed)} of {len(self._exercises)} passed"
        _show(Table(title=title, rows=tuple(self._row(name) for name in self._exercises)))

    def finish(self) -> None:
        """End a teacher's copy: nothing happens if all is well.

        Raises:
            NotPassedError: an exercise was not passed, there is none, or a cell took three minutes or more.
        """
        wrong = [f"{name}: not passed" for name in self._exercises if not self._of(name).passed]
        wrong += [] if self._exercises else ["no exercise was defined"]
        if self._cells.longest_seconds >= CELL_SECONDS:
            taken, limit = format_seconds(self._cells.longest_seconds), format_seconds(CELL_SECONDS)
            wrong.append(f"a cell took {taken}; expected less than {limit}")
        if wrong:
            raise NotPassedError("\n  ".join([f"{self.title} is not finished", *wrong]))

    def _of(self, name: str) -> _Marks:
        return self._marks.setdefault(name, _Marks())

    def _find(self, name: Any, asked: str) -> _Exercise:
        if isinstance(name, str) and name in self._exercises:
            return self._exercises[name]
        own = next((n for n in self._exercises if self._shell.user_ns.get(n, ...) is name), "")
        if own or not isinstance(name, str):  # the answer itself
            quoted = f'{self._own_name}.{asked}("{own or "name"}")'
            raise LessonError(f"{asked} takes the name of an exercise in quotes: {quoted}")
        near = get_close_matches(name, self._exercises, n=1)
        there = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(self._exercises) or '(none yet)'}"
        raise LessonError(f"no exercise {name!r}, {there}\n  run the cell that defines the exercises first")

    def _with_hint(self, name: str, verdict: Verdict) -> Verdict:
        left = len(self._exercises[name].hints) - self._of(name).hints
        if verdict.state != "not yet" or not self._exercises[name].hints:
            return verdict
        words = f'{self._own_name}.hint("{name}"){f": {left} left" if left else " shows them again"}'
        return Verdict(name=name, state=verdict.state, rows=(*verdict.rows, ("hint", words)))

    @property
    def _own_name(self) -> str:
        """What the notebook calls this lesson."""
        names: Mapping[str, Any] = self._shell.user_ns
        return next((n for n, value in names.items() if value is self and not n.startswith("_")), "lesson")

    def _row(self, name: str) -> tuple[str, str, str]:
        marks = self._of(name)
        state: State = "right" if marks.passed else "not yet" if marks.tries else "open"
        tries = f"{marks.tries} {'try' if marks.tries == 1 else 'tries'}" if marks.tries else ""
        hints = f"{marks.hints} hint{'s' if marks.hints != 1 else ''}" if marks.hints else ""
        return name, f"{SIGNS[state]} {state}", " · ".join(word for word in (tries, hints) if word)


def _show(value: Displayed) -> None:
    """Text, and HTML where somebody looks on; a display holds strings only."""
    html = None if is_static(os.environ) else value._repr_html_()
    display({"text/plain": str(value), **({"text/html": html} if html else {})}, raw=True)
