"""Which columns hold what: found from the first rows, said in the plan, and an error that names the remedy.

========================  ==========================================  ======================
format                    columns                                     also read
========================  ==========================================  ======================
messages                  ``messages``                                ``tools``
prompt and completion     ``prompt``, ``completion``                  ``tools``
Alpaca                    ``instruction``, ``output``                 ``input``, ``system``
ShareGPT                  ``conversations``                           ``system``, ``tools``
text                      ``text``
========================  ==========================================  ======================

Where the columns of several are there, the one that more of the first rows fill counts, and of equals the
one that stands first here. Case and spaces around a column's name do not matter. Other columns are left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data import convert as c
from nbqlora.data.columns import named, rename_hint, written
from nbqlora.data.messages import RowError, as_list, is_missing, meant_role
from nbqlora.data.rows import ACCEPTED
from nbqlora.data.source import Row


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the rows of one source are read.

    Args:
        name: "messages", "prompt and completion", "Alpaca", "ShareGPT" or "text".
        columns: those of the source that it reads.
        convert: a row of the source -> ``{"messages": [...]}``, ``{"prompt": ..., "completion": ...}`` (both text,
            or both lists of messages) or ``{"text": ...}``; with ``"tools": [...]`` where messages come with some.
            Raises :class:`RowError` for a row that cannot be used.
        passed_over: formats whose columns are there too.
    """

    name: str
    columns: tuple[str, ...]
    convert: Callable[[Row], Row]
    passed_over: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """``Alpaca (instruction, input, output)``; ``messages, not text`` where both are there."""
        plain = self.name == " and ".join(self.columns)
        columns = "" if plain else f" ({', '.join(self.columns)})"
        return f"{self.name}{columns}" + (f", not {' or '.join(self.passed_over)}" if self.passed_over else "")


@dataclass(frozen=True, kw_only=True)
class _Kind:
    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    convert: Callable[[Row], dict[str, Any]]


KINDS = (
    _Kind(name="messages", needs=("messages",), takes=("tools",), convert=c.from_messages),
    _Kind(name="prompt and completion", needs=("prompt", "completion"), takes=("tools",), convert=c.from_prompt),
    _Kind(name="Alpaca", needs=("instruction", "output"), takes=("input", "system"), convert=c.from_alpaca),
    _Kind(name="ShareGPT", needs=("conversations",), takes=("system", "tools"), convert=c.from_sharegpt),
    _Kind(name="text", needs=("text",), takes=(), convert=c.from_text),
)


def detect_format(rows: Sequence[Row], source: str) -> Format:
    """The format of a source.

    Args:
        rows: its first rows, at least one.
        source: its name in errors.

    Raises:
        DataError: no format's columns are there, or they are empty in all these rows, or hold roles that no
            chat template knows.
    """
    columns = list(dict.fromkeys(str(column) for row in rows for column in row))
    known = [(kind, named((*kind.needs, *kind.takes), columns)) for kind in KINDS]
    present = [(kind, names) for kind, names in known if names.keys() >= set(kind.needs)]
    if not present:
        raise DataError(f"{source} has {written(columns)}; {rename_hint(columns, rows)}{ACCEPTED}")
    filled = [sum(_has(row, kind, names) for row in rows) for kind, names in present]
    if not any(filled):
        first = "its only row" if len(rows) == 1 else f"any of its first {len(rows)} rows"
        raise DataError(f"{source} has nothing (None or NaN) in {_empty(*present[0], rows)} in {first}; {ACCEPTED}")
    kind, names = present[filled.index(max(filled))]
    if kind.name == "messages":
        _check_names(rows, names["messages"], source)
    return Format(
        name=kind.name,
        columns=tuple(column for column in columns if column in names.values()),
        # What is optional may well be missing in all of the first rows.
        convert=partial(_convert, kind.convert, {**{name: name for name in kind.takes}, **names}),
        passed_over=tuple(k.name for (k, _), n in zip(present, filled, strict=True) if n and k is not kind),
    )


def _convert(convert: Callable[[Row], dict[str, Any]], names: Mapping[str, str], row: Row) -> dict[str, Any]:
    return convert({name: row.get(column) for name, column in names.items()})


def _has(row: Row, kind: _Kind, names: Mapping[str, str]) -> bool:
    return not any(is_missing(row.get(names[name])) for name in kind.needs)


def _empty(kind: _Kind, names: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The needed columns without a single value; all of them where each has some, in different rows."""
    columns = [names[name] for name in kind.needs]
    empty = [column for column in columns if all(is_missing(row.get(column)) for row in rows)]
    return " and ".join(empty) if empty else " or ".join(columns)


def _check_names(rows: Sequence[Row], column: str, source: str) -> None:
    """Raise :class:`DataError` where every conversation writes its roles, or its keys, in another format's words."""
    conversations = list(_conversations(rows, column))
    if conversations and all(any("from" in t and "role" not in t for t in turns) for turns in conversations):
        raise DataError(f'{source}: {column} holds turns with "from" and "value"; rename {column} to conversations')
    wrong: dict[str, str] = {}
    for turns in conversations:
        roles = [turn["role"] for turn in turns if isinstance(turn.get("role"), str)]
        others = {role: meant_role(role) for role in roles if meant_role(role) != role}
        if not others:
            return
        wrong |= others
    if wrong:
        said, meant = (" and ".join(f'"{w}"' for w in words) for words in (wrong, dict.fromkeys(wrong.values())))
        raise DataError(f"{source}: the roles in {column} are {said}; write {meant}")


def _conversations(rows: Sequence[Row], column: str) -> Iterator[list[Mapping[str, Any]]]:
    """The turns of each row that has some."""
    for row in rows:
        try:
            turns = [turn for turn in as_list(row.get(column)) if isinstance(turn, Mapping)]
        except RowError:
            continue
        if turns:
            yield turns
