"""How a value of ``core`` gets its text and HTML without knowing who draws it.

``view`` sits above ``core`` and introduces its renderers with :func:`register`; until it has (a bare
``import nbqlora.core``), ``str()`` is the short ``repr()``. Jupyter asks for ``_repr_html_``, so no
formatter has to be installed in IPython.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

_text: dict[type, Callable[[Any], str]] = {}
_html: dict[type, Callable[[Any], str]] = {}


def register(kind: type, *, text: Callable[[Any], str], html: Callable[[Any], str]) -> None:
    """Say how values of ``kind`` read as plain text and as HTML."""
    _text[kind], _html[kind] = text, html


def is_static(environ: Mapping[str, str], asked: bool = False) -> bool:
    """Whether output must not update: asked for, set by ``NBQLORA_DISPLAY``, or no front end to update in."""
    setting = environ.get("NBQLORA_DISPLAY", "")
    return asked or setting == "static" or (not setting and environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Batch")


class Displayed:
    """Base of values that people look at; subclasses define a short, stable ``__repr__``."""

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        # IPython takes the first of the two that it meets in the order of classes, and each has a repr of its own.
        cls._repr_pretty_ = Displayed._repr_pretty_  # type: ignore[method-assign]

    def __str__(self) -> str:
        renderer = _text.get(type(self))
        return renderer(self) if renderer else repr(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What IPython shows as plain text: the whole, where ``repr`` is one line."""
        printer.text(str(self))

    def _repr_html_(self) -> str | None:
        renderer = _html.get(type(self))
        return renderer(self) if renderer else None
