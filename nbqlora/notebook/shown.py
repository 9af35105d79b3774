"""What a line magic gives: shown where it stands, and a value that the cell does not show a second time.

IPython displays a value only behind a cell's last line, and a magic cannot know whether it stands there or behind a
``=``. So it displays at once, and its value stays silent until the cell is over: then ``r`` alone shows it, as any
value.
"""

from __future__ import annotations

import json
from typing import Any

from IPython.display import display

from nbqlora.core.display import Displayed


class Data(dict[str, Any]):
    """Plain values that print as JSON."""

    def __str__(self) -> str:
        return json.dumps(self, indent=1)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))


def bundle_of(value: Displayed) -> dict[str, str]:
    """Text and HTML of a value: a display holds strings, never the value."""
    html = value._repr_html_()
    return {"text/plain": str(value), **({"text/html": html} if html else {})}


def shown(shell: Any, value: Displayed, *, as_json: bool = False) -> Any:
    """Display the value, or print its JSON, and give it back."""
    if as_json:
        data = Data(getattr(value, "as_dict")())  # noqa: B009
        print(data)  # noqa: T201
        return _silent(shell, data)
    display(bundle_of(value), raw=True)
    return _silent(shell, value)


def _silent(shell: Any, value: Any) -> Any:
    """The value, which displays as nothing until the cell that runs is over."""
    vars(value)["_ipython_display_"] = _nothing

    def end(*_: Any) -> None:
        vars(value).pop("_ipython_display_", None)
        shell.events.unregister("post_run_cell", end)

    shell.events.register("post_run_cell", end)
    return value


def _nothing() -> None:
    """Shown already."""
