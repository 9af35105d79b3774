"""An answer in one short line, as its author wrote it; a model or a long list does not fill the page."""

from __future__ import annotations

from types import FunctionType
from typing import Any

_WIDTH = 60


def given(answer: Any) -> str:
    """``4608``, ``'9,216'``, ``[1, 2, 3, ...``, ``the function f``; an object whose repr fails is named by its type."""
    if isinstance(answer, FunctionType):
        return f"the function {answer.__name__}"
    try:
        words = " ".join(repr(answer).split())
    except Exception as error:
        return f"a {type(answer).__name__}, whose repr raised {type(error).__name__}"
    return words if len(words) <= _WIDTH else f"{words[: _WIDTH - 3]}..."
