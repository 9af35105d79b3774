"""Names of columns: found in any case, and the nearest guess where a format's own names are missing.

The words are those that public data sets use for the same thing. A guess is only said, never taken: which
column is the answer decides what is learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from nbqlora.data.messages import is_missing
from nbqlora.data.source import Row

# What others call it, likeliest first.
WORDS: dict[str, tuple[str, ...]] = {
    "messages": ("message", "conversation", "dialog", "dialogue", "chat", "turns", "history", "chosen"),
    "conversations": ("conversation", "dialog", "dialogue", "chat", "turns", "history"),
    "prompt": ("question", "query", "instruction", "input", "inputs", "problem", "request", "user", "human"),
    "completion": ("answer", "response", "output", "outputs", "solution", "reply", "target", "assistant", "chosen"),
    "instruction": ("task", "question", "prompt", "query"),
    "output": ("response", "answer", "completion", "target", "reply", "outputs"),
    "text": ("content", "document", "body", "article", "passage"),
}
# Which columns go together, best first.
GUESSES = (("messages",), ("conversations",), ("prompt", "completion"), ("instruction", "output"), ("text",))
MOST_SHOWN = 12
LONGEST_NAME = 40


@dataclass(frozen=True, kw_only=True)
class _Guess:
    """Columns to rename, and whether a name of the format is there without."""

    renames: Mapping[str, str]
    has_some: bool


def named(wanted: Sequence[str], columns: Sequence[str]) -> dict[str, str]:
    """The column of each wanted name that is there: spelled so, else the first that differs in case or spaces."""
    alike: dict[str, str] = {}
    for column in columns:
        alike.setdefault(column.strip().lower(), column)
    found = {name: name if name in columns else alike.get(name) for name in wanted}
    return {name: column for name, column in found.items() if column is not None}


def written(columns: Sequence[str]) -> str:
    """``the columns a, b and 30 more``."""
    if not columns:
        return "no columns"
    shown = [c if len(c) <= LONGEST_NAME else f"{c[: LONGEST_NAME - 3]}..." for c in columns[:MOST_SHOWN]]
    more = f" and {len(columns) - MOST_SHOWN} more" if len(columns) > MOST_SHOWN else ""
    return f"the column{'s' if len(columns) > 1 else ''} {', '.join(shown)}{more}"


def rename_hint(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """``rename question to prompt and answer to completion; ``, or "" where nothing comes near."""
    if {"role", "content"} <= set(columns):
        return "each row is one message; a row holds all messages of a conversation as a list; "
    if any(len(column) > LONGEST_NAME for column in columns):
        return "the first line seems to be a row already: put the columns' names above it; "
    guesses = [guess for wanted in GUESSES if (guess := _renames(wanted, columns, rows))]
    # Names that are there already say more than those that only sound alike.
    best = min(guesses, key=lambda guess: not guess.has_some, default=None)
    return f"rename {' and '.join(f'{old} to {new}' for old, new in best.renames.items())}; " if best else ""


def _renames(wanted: Sequence[str], columns: Sequence[str], rows: Sequence[Row]) -> _Guess | None:
    """A column for each wanted name that is not there; None where one has none."""
    has = named(wanted, columns)
    renames: dict[str, str] = {}
    for name in wanted:
        if name in has:
            continue
        free = [c for c in _candidates(name, columns) if c not in has.values() and c not in renames]
        column = next((c for c in free if _holds(rows, c, name)), None)
        if column is None:
            return None
        renames[column] = name
    if "instruction" in wanted and "context" in columns and "input" not in columns:
        # Without it the answers would stand without what they are drawn from.
        renames["context"] = "input"
    return _Guess(renames=renames, has_some=bool(has))


def _candidates(name: str, columns: Sequence[str]) -> list[str]:
    words = named(WORDS[name], columns)
    return [words[word] for word in WORDS[name] if word in words] + get_close_matches(name, columns, n=1, cutoff=0.8)


def _holds(rows: Sequence[Row], column: str, name: str) -> bool:
    """Whether the column's first value is of the kind that belongs under this name."""
    value: Any = next((row[column] for row in rows if not is_missing(row.get(column))), None)
    key = {"messages": "role", "conversations": "from"}.get(name)
    if key is None:
        return isinstance(value, str)
    turns = value.tolist() if hasattr(value, "tolist") else value
    return isinstance(turns, (list, tuple)) and bool(turns) and isinstance(turns[0], Mapping) and key in turns[0]
