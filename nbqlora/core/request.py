"""TOML -> ``CellRequest``: the options a person wrote, and the line of each.

Cells and ``nbqlora finetune FILE.toml`` share this. TOML because it is typed, knows comments and is in
the standard library. A syntax error does not hide the others, nor what validation has to say.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.toml_text import read_toml


@dataclass(frozen=True, kw_only=True, repr=False)
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

    def __repr__(self) -> str:
        return f"CellRequest({self.source}: {', '.join(self.options) or 'no options'})"


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
        ConfigError: there is nothing in the text at all, or it is a Python dict.
    """
    if text.lstrip("\ufeff \t\r\n").startswith("{"):
        line = first_line + text[: text.index("{")].count("\n")
        hint = 'write one key = value a line, without braces and commas: model = "demo"'
        raise ConfigError([Problem(key="{", message="a Python dict or JSON is no TOML", hint=hint, line=line)], source)
    read = read_toml(text, first_line=first_line, objects=namespace or {})
    if not (read.options or read.problems):
        hint = 'start with model = "demo" and data = "demo"'
        raise ConfigError([Problem(key="", message="it is empty", hint=hint)], source)
    problems, mapping = list(read.problems), dict[str, Any]()
    for key, value in _texts(read.options):
        if value.startswith("$"):
            wrong = _unresolved(value, namespace)
            if wrong:
                problems.append(Problem(key=key, message=wrong[0], hint=wrong[1], line=read.line_of.get(key)))
            else:
                mapping[value] = (namespace or {})[value[1:]]
    return CellRequest(
        options=read.options, mapping=mapping, line_of=read.line_of, source=source, problems=tuple(problems)
    )


@contextmanager
def lines_of(request: CellRequest) -> Iterator[None]:
    """Within, what is wrong with an option names its line, also when only the model or the machine tells."""
    try:
        yield
    except ConfigError as error:
        if error.source == request.source:
            raise
        located = error.located(request.line_of, request.source)
        located.earlier_frames = error.earlier_frames
        raise located.with_traceback(error.__traceback__) from None


def resolve(value: Any, mapping: Mapping[str, Any]) -> Any:
    """``value`` with the objects that its ``"$name"`` texts stand for; lists of text become tuples."""
    if isinstance(value, str):
        return mapping.get(value, value)
    if isinstance(value, dict):
        return {k: resolve(v, mapping) for k, v in value.items()}
    if isinstance(value, list) and value and all(isinstance(v, str) for v in value):
        return tuple(resolve(v, mapping) for v in value)
    return value


def _texts(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Every text in the options, with its dotted key."""
    if isinstance(value, str):
        return [(key, value)]
    if isinstance(value, dict):
        return [found for k, v in value.items() for found in _texts(v, f"{key}.{k}" if key else str(k))]
    if isinstance(value, list):
        return [found for v in value for found in _texts(v, key)]
    return []


def _unresolved(value: str, namespace: Mapping[str, Any] | None) -> tuple[str, str] | None:
    """Why ``"$name"`` stands for nothing, and what to do."""
    name = value[1:]
    if namespace is None:
        return f"{value} names an object of a notebook, and there is none here", "give a file instead"
    if not name.isidentifier():
        hint = "give the object a name in a cell above; environment variables are not read"
        return f"expected $ and the name of an object, got {value}", hint
    if name in namespace:
        return None
    close = get_close_matches(name, [n for n in namespace if not n.startswith("_")], n=1)
    hint = f"did you mean ${close[0]}?" if close else f"run the cell that makes {name} first"
    return f"this notebook has no object {name}", hint
