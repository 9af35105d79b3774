"""What an answer should be, and what is said kindly to one that is something else.

An expectation looks at an answer and gives nothing when it is right, else a finding: what was expected, and what to
try. It never shows the right answer, only its kind and on which side it lies: who is told the number stops thinking.
What people really write in a room is met by name: a number in quotes, ``1,024``, ``True``, ``None`` from a ``print``,
a function that was not called, one that does not return. A teacher adds the mistakes of the subject: ``mistakes`` and
``wrong`` say why that very answer is not the one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from nbqlora.notebook.teach_given import given


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Why an answer is not right yet.

    Args:
        expected: what was expected, in words.
        advice: what to try; "" for the exercise's hints to say.
    """

    expected: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Expectation:
    """What an answer should be.

    Args:
        wanted: its kind, in words ("a whole number").
        look: gives None for a right answer; called after every try, so it changes nothing.
    """

    wanted: str
    look: Callable[[Any], Finding | None]


def number(
    expected: float | Callable[[], float],
    *,
    unit: str = "",
    within: float = 0.0,
    mistakes: Mapping[float, str] | None = None,
) -> Expectation:
    """A number.

    Args:
        expected: the right one, or a function that gives it when it is needed (from a run, a plan, ...).
        unit: said with what is expected.
        within: how far off it may be, in the same unit.
        mistakes: wrong numbers that people find, each with what to say about it.

    Raises:
        ValueError: the right number stands among the mistakes.
    """
    known = dict(mistakes or {})
    if not callable(expected) and _nearest(known, expected, within) is not None:
        raise ValueError(f"mistakes: {expected} is the right answer; expected other numbers")
    whole = isinstance(expected, int) and not within
    wanted = f"a {'whole ' if whole else ''}number{f' ({unit})' if unit else ''}"

    def look(answer: Any) -> Finding | None:
        if advice := _no_number(answer):
            return Finding(expected=wanted, advice=advice)
        value, right = float(answer), float(expected() if callable(expected) else expected)
        if _close(value, right, within):
            return None
        mistake = _nearest(known, value, within)
        side = "larger" if right > value else "smaller"
        return Finding(expected=f"{wanted}, {side} than that", advice="" if mistake is None else known[mistake])

    return Expectation(wanted=wanted, look=look)


def choice(right: str, wrong: Mapping[str, str]) -> Expectation:
    """One of some letters or words; case does not matter.

    Args:
        right: the right one.
        wrong: the others, each with what to say about it.

    Raises:
        ValueError: the right one stands among the wrong ones, or there is no other.
    """
    others = {_plain(key): advice for key, advice in wrong.items()}
    if not others or _plain(right) in others:
        raise ValueError(f"wrong: expected answers other than {right!r}, got {sorted(wrong)}")
    words = [f'"{word}"' for word in sorted([*others, _plain(right)])]
    wanted = f"{', '.join(words[:-1])} or {words[-1]}"

    def look(answer: Any) -> Finding | None:
        if not isinstance(answer, str):
            return Finding(expected=wanted, advice="write one of them, with its quotes")
        if _plain(answer) == _plain(right):
            return None
        return Finding(expected=wanted, advice=others.get(_plain(answer), "write one of them"))

    return Expectation(wanted=wanted, look=look)


def gives(*cases: tuple[tuple[Any, ...], Any]) -> Expectation:
    """A function, tried on examples.

    Args:
        *cases: arguments, and what the function should give for them; numbers may differ by a millionth.
    """
    wanted = f"a function of {len(cases[0][0])} values"

    def look(answer: Any) -> Finding | None:
        if not callable(answer):
            return Finding(expected=wanted, advice="define it with def, and do not call it: no () behind its name")
        return next((found for case in cases if (found := _tried(answer, *case))), None)

    return Expectation(wanted=wanted, look=look)


def passes(
    wanted: str, kind: type | tuple[type, ...], *conditions: tuple[str, Callable[[Any], bool], str]
) -> Expectation:
    """Anything for which some conditions hold: a plan, a run, a list of rows.

    Args:
        wanted: what it is, in words ("a plan").
        kind: its type.
        *conditions: each in words, as a test, and what to try where it does not hold; the first that fails is said.
    """

    def look(answer: Any) -> Finding | None:
        if not isinstance(answer, kind):
            return Finding(expected=wanted, advice=f"{given(answer)} is of another kind: {type(answer).__name__}")
        broken = next(((words, advice) for words, test, advice in conditions if not test(answer)), None)
        return None if broken is None else Finding(expected=f"{wanted}: {broken[0]}", advice=broken[1])

    return Expectation(wanted=wanted, look=look)


def _tried(function: Callable[..., Any], arguments: tuple[Any, ...], right: Any) -> Finding | None:
    call = f"({', '.join(given(a) for a in arguments)})"
    expected = f"{given(right)} for {call}"
    try:
        got = function(*arguments)
    except Exception as error:
        return Finding(expected=expected, advice=f"for {call} the function raised {type(error).__name__}: {error}")
    if got is None:
        return Finding(expected=expected, advice="the function gave nothing back: end it with return")
    same = _close(float(got), right, 0) if isinstance(got, Real) and isinstance(right, Real) else bool(got == right)
    return None if same else Finding(expected=expected, advice=f"for {call} the function gave {given(got)}")


def _no_number(answer: Any) -> str:
    """What to do about an answer that is no number; "" for one that is."""
    if isinstance(answer, bool):
        return "True and False answer a yes-or-no question; write a number"
    if isinstance(answer, str):
        return "it is text: write the number alone, without quotes and without its unit"
    if answer is None:
        return "None is what print(...) gives back: leave print out"
    if isinstance(answer, tuple):
        return "a comma makes several numbers of it: write 1024 or 1_024 for 1,024"
    if callable(answer):
        return "this is a function: call it, with () behind its name"
    try:
        return "" if math.isfinite(float(answer)) else "this is no finite number: look for a division by zero"
    except (TypeError, ValueError, RuntimeError):  # also of arrays and tensors with more than one value
        return f"this is of another kind ({type(answer).__name__}): take one number out of it"


def _close(value: float, right: Any, within: float) -> bool:
    return math.isclose(value, right, rel_tol=1e-6, abs_tol=within) if within == 0 else abs(value - right) <= within


def _nearest(known: Mapping[float, str], value: float, within: float) -> float | None:
    return next((mistake for mistake in known if _close(value, mistake, within)), None)


def _plain(word: str) -> str:
    """``A)``, ``a`` and `` a. `` are the same letter."""
    return word.strip(" ().\n\t").casefold()
