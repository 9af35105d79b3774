"""Tools and tool calls, in the one form that chat templates are written for.

Data sets keep them in many: as objects, as JSON text (a column of a table cannot hold objects that differ),
or padded with None wherever another row has a key that this one lacks. Templates write a call's arguments
as JSON themselves: given as text they would be quoted twice, without an error.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def without_missing(value: Any) -> Any:
    """A copy of nested lists and mappings without the keys whose value is None; arrays become lists."""
    if isinstance(value, Mapping):
        return {str(key): without_missing(given) for key, given in value.items() if given is not None}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [without_missing(given) for given in value]
    return value


def read_tools(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a row offers.

    Args:
        value: a list of tools, each an object or JSON text of one, or JSON text of such a list.

    Returns:
        The list, empty for nothing; None where ``value`` is something else.
    """
    return _objects(value)


def read_tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """The calls that one message makes, their arguments as objects; else like :func:`read_tools`."""
    calls = _objects(value)
    for call in calls or ():
        function = call.get("function", call)
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _parsed(function["arguments"])
    return calls


def _objects(value: Any) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and not value.strip():
        return []
    # In text a null is meant; in a table it may stand for a key that another row has.
    items = _parsed(value) if isinstance(value, str) else without_missing(value)
    if not isinstance(items, list):
        return None
    items = [_parsed(item) for item in items]
    return items if all(isinstance(item, dict) for item in items) else None


def _parsed(value: Any) -> Any:
    """Objects and lists from JSON text; everything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        read = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return read if isinstance(read, (dict, list)) else value
