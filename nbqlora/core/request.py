"""TOML -> ``CellRequest``: the options a person wrote, and the line of each.

Cells and ``nbqlora finetune FILE.toml`` share this. TOML because it is typed, knows comments and is in
the standard library; ``tomllib`` gives no line numbers, so they are found by a scan of the text. A
syntax error does not hide the others: the offending line is blanked and parsing goes on.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from nbqlora.core.errors import ConfigError, Problem

_KEY = re.compile(r"""^\s*(?P<key>[A-Za-z0-9_.-]+|"[^"]+")\s*=\s*(?P<value>.*)$""")
_TABLE = re.compile(r"^\s*\[\s*(?P<name>[A-Za-z0-9_.-]+)\s*\]\s*(#.*)?$")
_WHERE = re.compile(r"\(at line (\d+), column \d+\)|\(at end of document\)")
_BARE_WORD = re.compile(r"^[A-Za-z_$./~][^\"'\[{#]*$")
MAX_SYNTAX_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class CellRequest:
    """What was asked for, before it is checked.

    Args:
        options: keys and values as parsed; the tables ``trl`` and ``peft`` are nested mappings.
        mapping: the notebook's objects that ``"$name"`` values stand for, by ``"$name"``.
        line_of: line of each key, ``trl.key`` for a key of a table; empty when the options came from Python.
        source: what held the options, for error messages.
        problems: what could not be read; validation adds its own, so that all are told at once.
    """

    options: Mapping[str, Any]
    mapping: Mapping[str, Any] = field(default_factory=dict)
    line_of: Mapping[str, int] = field(default_factory=dict)
    source: str = "the options"
    problems: tuple[Problem, ...] = ()


def parse_toml(
    text: str, *, first_line: int = 1, source: str = "this file", namespace: Mapping[str, Any] | None = None
) -> CellRequest:
    """Read options from TOML.

    Args:
        text: the body.
        first_line: what the editor calls the body's first line (2 in a cell, below the magic).
        source: what holds the text, for error messages.
        namespace: objects that ``"$name"`` may stand for; None where there is no notebook.

    Returns:
        The request; syntax errors and unknown ``$name`` values are among its ``problems``.

    Raises:
        ConfigError: there is nothing in the text at all.
    """
    options, problems = _parse(text, first_line)
    line_of = _lines(text, first_line)
    mapping: dict[str, Any] = {}
    for key, value in _flat(options):
        if isinstance(value, str) and value.startswith("$"):
            _resolve(key, value, namespace, mapping, problems, line_of)
    if not (options or problems):
        hint = 'start with model = "demo" and data = "demo"'
        raise ConfigError([Problem(key="", message="it is empty", hint=hint)], source)
    return CellRequest(options=options, mapping=mapping, line_of=line_of, source=source, problems=tuple(problems))


def _parse(text: str, first_line: int) -> tuple[dict[str, Any], list[Problem]]:
    lines, problems = text.splitlines(), list[Problem]()
    for _ in range(MAX_SYNTAX_PROBLEMS):
        try:
            return tomllib.loads("\n".join(lines)), problems
        except tomllib.TOMLDecodeError as error:
            found = _WHERE.search(str(error))
            at = int(found.group(1)) if found and found.group(1) else len(lines)
            index = max(0, min(at, len(lines)) - 1)
            problems.append(_syntax_problem(lines[index], str(error), index + first_line))
            if not lines[index].strip():
                break
            lines[index] = ""
    return {}, problems


def _syntax_problem(line: str, error: str, number: int) -> Problem:
    message = _WHERE.sub("", error).strip().rstrip(":")
    found = _KEY.match(line)
    if not found:
        hint = 'a line reads key = value, text in quotes: model = "demo"'
        return Problem(key=line.strip()[:40], message=f"not TOML: {message}", hint=hint, line=number)
    key, value = found.group("key"), found.group("value").split("#")[0].strip()
    if value in ("True", "False"):
        return Problem(key=key, message=f"{value} is Python's spelling", hint=f"write {value.lower()}", line=number)
    if value == "None":
        return Problem(key=key, message="TOML has no None", hint="leave the line out", line=number)
    if not value:
        return Problem(key=key, message="has no value", hint="", line=number)
    if _BARE_WORD.match(value):
        return Problem(key=key, message="text needs quotes", hint=f'write {key} = "{value}"', line=number)
    return Problem(key=key, message=f"not TOML: {message}", line=number)


def _lines(text: str, first_line: int) -> dict[str, int]:
    """Line of each top-level key and of each ``table.key``; text inside multi-line values is passed over."""
    line_of: dict[str, int] = {}
    prefix, inside = "", None
    for number, line in enumerate(text.splitlines(), start=first_line):
        if inside:
            inside = None if inside in line else inside
            continue
        table, key = _TABLE.match(line), _KEY.match(line)
        if table:
            prefix = table.group("name") + "."
            line_of.setdefault(table.group("name"), number)
        elif key:
            line_of.setdefault(prefix + key.group("key").strip('"'), number)
            for quotes in ('"""', "'''"):
                if key.group("value").count(quotes) == 1:
                    inside = quotes
    return line_of


def _flat(options: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in options.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]
    return rows


def _resolve(
    key: str,
    value: str,
    namespace: Mapping[str, Any] | None,
    mapping: dict[str, Any],
    problems: list[Problem],
    line_of: Mapping[str, int],
) -> None:
    name, line = value[1:], line_of.get(key)
    if namespace is None:
        message = f"{value} names an object of a notebook, and there is none here"
        problems.append(Problem(key=key, message=message, hint="give a file instead", line=line))
    elif name not in namespace:
        close = get_close_matches(name, [n for n in namespace if not n.startswith("_")], n=1)
        hint = f"did you mean ${close[0]}?" if close else f"run the cell that makes {name} first"
        problems.append(Problem(key=key, message=f"this notebook has no object {name}", hint=hint, line=line))
    else:
        mapping[value] = namespace[name]
