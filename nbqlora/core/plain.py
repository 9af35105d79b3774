"""Values as JSON can hold them: what every ``as_dict`` goes through.

A figure that is not finite becomes None (JSON has no word for it), and an object that only a notebook
can hold becomes a short description: no tensor, row or secret is copied into a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from os import PathLike, fspath
from typing import Any


def plain(value: Any) -> Any:
    """A copy of ``value`` made of dicts, lists, text, numbers, booleans and None."""
    if isinstance(value, Enum):
        return plain(value.value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, PathLike):
        return str(fspath(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return described(value)


def described(value: Any) -> Any:
    """Text and None as they are; rows in memory by type and number only."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, PathLike):
        return str(fspath(value))
    size = f" of {len(value)} rows" if hasattr(value, "__len__") else ""
    return f"<{type(value).__name__}{size}>"
