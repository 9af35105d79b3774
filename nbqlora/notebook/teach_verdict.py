"""What a student sees below an exercise, and what a teacher sees of all of them: a few lines of text, and small HTML.

The first line of a verdict has one form, ``✓ name: right``, since it is also the record: a teacher who collects the
notebooks reads it from their saved outputs (:mod:`nbqlora.notebook.teach_room`). A sign, a word and a colour say the
same, so none of them is needed to understand it.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from nbqlora.core.display import Displayed
from nbqlora.notebook.teach_answers import Expectation, Finding
from nbqlora.notebook.teach_given import given
from nbqlora.view.html import rows_html

State = Literal["right", "not yet", "open"]
SIGNS: Mapping[State, str] = {"right": "✓", "not yet": "✗", "open": "·"}
_COLOURS: Mapping[State, str] = {"right": "#31865A", "not yet": "#E88543", "open": "#8C8C8C"}
_HEAD = re.compile(rf"[{''.join(SIGNS.values())}] (\w+): ({'|'.join(SIGNS)})")
_WIDTH, _LABEL_WIDTH = 100, 9


@dataclass(frozen=True, kw_only=True, repr=False)
class Verdict(Displayed):
    """What was found about an answer.

    Args:
        name: of the exercise.
        rows: label and words below the first line.
    """

    name: str
    state: State
    rows: tuple[tuple[str, str], ...] = ()

    @property
    def head(self) -> str:
        """``✗ name: not yet``."""
        return f"{SIGNS[self.state]} {self.name}: {self.state}"

    def __repr__(self) -> str:
        return f"Verdict({self.name}: {self.state})"

    def __str__(self) -> str:
        return "\n".join([self.head, *(_line(label, words) for label, words in self.rows)])

    def _repr_html_(self) -> str:
        table = rows_html((label, words, "") for label, words in self.rows) if self.rows else ""
        return (
            f'<section role="status" aria-label="exercise {escape(self.name)}: {self.state}" style="max-width:900px;'
            f'border-left:4px solid {_COLOURS[self.state]};padding-left:10px"><p style="margin:4px 0">'
            f"<strong>{escape(self.head)}</strong></p>{table}</section>"
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Table(Displayed):
    """Which exercises were passed: a row for each, or for each person.

    Args:
        title: above it.
        rows: label, value and remark.
    """

    title: str
    rows: tuple[tuple[str, str, str], ...]

    def __repr__(self) -> str:
        return f"Table({self.title})"

    def __str__(self) -> str:
        widths = [max((len(row[i]) for row in self.rows), default=0) for i in (0, 1)]
        lines = [
            f"  {label:<{widths[0]}}  {value:<{widths[1]}}  {remark}".rstrip() for label, value, remark in self.rows
        ]
        indent = " " * (widths[0] + 4)
        return "\n".join([self.title, *(textwrap.fill(line, _WIDTH, subsequent_indent=indent) for line in lines)])

    def _repr_html_(self) -> str:
        return f"<section><p><strong>{escape(self.title)}</strong></p>{rows_html(self.rows)}</section>"


def judge(name: str, expectation: Expectation, namespace: Mapping[str, Any], *, because: str) -> Verdict:
    """Look at an answer; never raises for what the answer is.

    Args:
        name: of the exercise, and of the variable that holds the answer.
        namespace: the notebook's variables.
        because: said when it is right.
    """
    answer = namespace.get(name, ...)
    if answer is ...:
        how = (
            f"write your answer in place of ... in {name} = ..."
            if name in namespace
            else f"run the cell that sets {name}"
        )
        return Verdict(name=name, state="open", rows=(("expected", expectation.wanted), ("try", how)))
    try:
        found = expectation.look(answer)
    except Exception as error:
        advice = f"it could not be checked: {type(error).__name__}: {error}; were all cells above run?"
        found = Finding(expected=expectation.wanted, advice=advice)
    if found is None:
        return Verdict(name=name, state="right", rows=(("because", because),) if because else ())
    tried = (("try", found.advice),) if found.advice else ()
    return Verdict(name=name, state="not yet", rows=(("you gave", given(answer)), ("expected", found.expected), *tried))


def read_heads(texts: Sequence[str]) -> dict[str, State]:
    """The verdicts among some outputs: the best state of each exercise."""
    found: dict[str, State] = {}
    for text in texts:
        head = _HEAD.fullmatch(text.split("\n", 1)[0])
        if head and found.get(head[1]) != "right":
            state: Any = head[2]
            found[head[1]] = state
    return found


def _line(label: str, words: str) -> str:
    indent = " " * (_LABEL_WIDTH + 3)
    return textwrap.fill(
        words, _WIDTH, initial_indent=f"  {label:<{_LABEL_WIDTH}} ", subsequent_indent=indent, break_long_words=False
    )
