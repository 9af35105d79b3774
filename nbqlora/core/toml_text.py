"""TOML that may be wrong -> what can be read of it, the line of each key, and what cannot be read.

``tomllib`` stops at the first mistake and often names a later line: for a list that is never closed, the
line after it. So the text is cut into statements first (a key with its value, or a table's header), each
is read alone, and the unreadable ones are left out before the whole is read.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbqlora.core.errors import Problem
from nbqlora.core.toml_mistakes import explain

TRIPLE = ('"""', "'''")
MAX_SYNTAX_PROBLEMS = 10
_PIECE = re.compile(r"""\"\"\"|'''|"(?:\\.|[^"\\])*"|'[^']*'|\#.*|[\[\]{}"']""")
_CLOSED_BY = {'"""': re.compile(r'(?:\\.|[^\\])*?"""'), "'''": re.compile(r".*?'''")}
_NEXT = re.compile(r"""^\s*(?:[A-Za-z0-9_-]+(?:\s*\.\s*[A-Za-z0-9_-]+)*\s*=|\[\s*[A-Za-z_][A-Za-z0-9_.-]*\s*\]\s*$)""")
_UNREADABLE = "(unreadable)"


@dataclass(frozen=True, kw_only=True)
class TomlText:
    """What could be read.

    Args:
        options: keys and values; tables are nested.
        line_of: line of each key and table, dotted; empty when the text has no key.
        problems: what could not be read, in the order of the lines.
    """

    options: Mapping[str, Any]
    line_of: Mapping[str, int]
    problems: tuple[Problem, ...]


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One key with its value, or one table's header.

    Args:
        line: number of its first line.
        unclosed: the bracket or triple quotes that the text never closes; "" for none.
        parsed: what it says on its own; None when it is no TOML.
        error: why not, in tomllib's words.
    """

    line: int
    text: str
    unclosed: str = ""
    parsed: Mapping[str, Any] | None = None
    error: str = ""

    @property
    def is_header(self) -> bool:
        """It begins a table."""
        return self.text.lstrip().startswith("[")


def read_toml(text: str, *, first_line: int, objects: Mapping[str, Any]) -> TomlText:
    """Read what can be read.

    Args:
        first_line: what the editor calls the text's first line.
        objects: names that a value may have been meant for, for hints.
    """
    lines = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n").split("\n")
    statements = [_read_alone(s) for s in _statements(lines, first_line)]
    problems = [_problem(s, objects) for s in statements if s.parsed is None]
    options, rest, conflicts = _read_together(statements)
    found = _shortened(sorted([*problems, *conflicts], key=lambda p: p.line or 0))
    return TomlText(options=options, line_of=_lines(rest), problems=found)


def _problem(statement: Statement, objects: Mapping[str, Any]) -> Problem:
    inside = re.search(r"at line (\d+)", statement.error)
    offset = int(inside.group(1)) - 1 if inside and not statement.unclosed else 0
    n_lines = statement.text.count("\n") + 1
    problem = explain(statement.text, statement.error, statement.unclosed, objects)
    return replace(problem, line=statement.line + min(offset, n_lines - 1))


def _shortened(problems: list[Problem]) -> tuple[Problem, ...]:
    more = len(problems) - MAX_SYNTAX_PROBLEMS
    if more <= 1:
        return tuple(problems)
    line = problems[MAX_SYNTAX_PROBLEMS].line
    return (*problems[:MAX_SYNTAX_PROBLEMS], Problem(key="...", message=f"{more} more lines are no TOML", line=line))


def _statements(lines: list[str], first_line: int) -> Iterator[Statement]:
    at = 0
    while at < len(lines):
        end, stack = at + 1, _open_after(lines[at], ())
        while stack and end < len(lines):
            stack = _open_after(lines[end], stack)
            end += 1
        if stack:
            # Never closed: the text goes on where a line looks like a statement of its own.
            end = at + 1
            while end < len(lines) and not _NEXT.match(lines[end]):
                end += 1
        yield Statement(line=first_line + at, text="\n".join(lines[at:end]), unclosed=stack[-1] if stack else "")
        at = end


def _open_after(line: str, stack: tuple[str, ...]) -> tuple[str, ...]:
    """Brackets and triple quotes that are open after ``line``, the innermost last."""
    at = 0
    while at < len(line):
        if stack and stack[-1] in TRIPLE:
            closed = _CLOSED_BY[stack[-1]].match(line, at)
            if not closed:
                break
            at, stack = closed.end(), stack[:-1]
            continue
        piece = _PIECE.search(line, at)
        # A comment, or a quote that is not closed, takes the rest of the line.
        if not piece or piece.group()[0] == "#" or piece.group() in ('"', "'"):
            break
        at = piece.end()
        if piece.group() in ("[", "{", *TRIPLE):
            stack = (*stack, piece.group())
        elif piece.group() in ("]", "}"):
            stack = stack[:-1]
    return stack


def _loads(text: str) -> tuple[dict[str, Any] | None, str]:
    try:
        return tomllib.loads(text), ""
    except (ValueError, RecursionError) as error:
        return None, str(error)


def _read_alone(statement: Statement) -> Statement:
    parsed, error = _loads(statement.text)
    return replace(statement, parsed=parsed, error=error)


def _read_together(statements: list[Statement]) -> tuple[dict[str, Any], list[Statement], list[Problem]]:
    """The options, the statements that they come from, and problems of those that contradict one above."""
    kept = [s if s.parsed is not None else _placeholder(s) for s in statements]
    kept = [s for s in kept if s.parsed]
    options, _ = _loads(_joined(kept))
    conflicts: list[Problem] = []
    if options is None:
        kept, conflicts = _agreeing(kept)
        options, _ = _loads(_joined(kept))
    return {k: v for k, v in (options or {}).items() if not k.startswith(_UNREADABLE)}, kept, conflicts


def _agreeing(statements: list[Statement]) -> tuple[list[Statement], list[Problem]]:
    agreed: list[Statement] = []
    conflicts: list[Problem] = []
    for statement in statements:
        if _loads(_joined([*agreed, statement]))[0] is not None:
            agreed.append(statement)
            continue
        conflicts.append(_conflict(agreed, statement))
        if statement.is_header:
            agreed.append(_placeholder(statement))
    return agreed, conflicts


def _joined(statements: list[Statement]) -> str:
    return "\n".join(s.text for s in statements)


def _placeholder(statement: Statement) -> Statement:
    """Nothing, or for a header another table, so that the keys below do not fall into the table above."""
    text = f'["{_UNREADABLE} {statement.line}"]' if statement.is_header else ""
    return replace(statement, text=text, parsed=_loads(text)[0])


def _conflict(agreed: list[Statement], statement: Statement) -> Problem:
    line_of = _lines(agreed)
    *_, (_, paths) = _located([*agreed, statement])
    twice = next((path for path in reversed(paths) if path in line_of), paths[-1])
    hint = f"first on line {line_of[twice]}; keep one" if twice in line_of else "it contradicts a line above"
    shown = f"[{twice}]" if statement.is_header else twice
    return Problem(key=shown, message="is given twice", hint=hint, line=statement.line)


def _lines(statements: list[Statement]) -> dict[str, int]:
    """Line of each key and table, dotted, and of what an inline table holds."""
    line_of: dict[str, int] = {}
    for statement, paths in _located(statements):
        for path in paths:
            line_of.setdefault(path, statement.line)
    return line_of


def _located(statements: list[Statement]) -> Iterator[tuple[Statement, list[str]]]:
    """Each statement with the dotted paths that it gives a value to."""
    prefix = ""
    for statement in statements:
        paths = list(_paths(statement.parsed or {}))
        if statement.is_header:
            prefix = paths[-1] + "."
            yield statement, paths
        else:
            yield statement, [prefix + path for path in paths]


def _paths(options: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in options.items():
        yield prefix + key
        if isinstance(value, Mapping):
            yield from _paths(value, f"{prefix}{key}.")
