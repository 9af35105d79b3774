"""A widget and its twin: the same as text and HTML, for pages that run no widgets.

Both go out in one bundle, and a front end takes what it can: GitHub and a static export show the twin, which stands as
it was when the cell ran. Controls are made when they are first shown, and never in static mode: a page that ran without
a front end would keep their state in the notebook's metadata, where a part that is missing blanks the page on GitHub.
Widgets are from the ipywidgets core alone (7.7 and 8), so no front end has to allow anything; ``Output`` is not among
them, since the classic notebook cannot make one with the packages that Colab has.
"""

from __future__ import annotations

import os
from functools import cached_property
from typing import Any

from nbqlora.core.display import is_static

_WIDGET = "application/vnd.jupyter.widget-view+json"


class Twinned:
    """Base of what is shown as a widget where there are widgets."""

    def twin(self) -> dict[str, Any]:
        """What stands for the widget: at least ``text/plain`` and ``text/html``."""
        raise NotImplementedError

    def build(self) -> Any:
        """Make the controls; called once."""
        raise NotImplementedError

    @cached_property
    def widget(self) -> Any:
        """The controls, as one widget."""
        return self.build()

    @property
    def shown(self) -> bool:
        """The controls were made."""
        return "widget" in self.__dict__

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        bundle = self.twin()
        if not is_static(os.environ):
            bundle[_WIDGET] = {"version_major": 2, "version_minor": 0, "model_id": self.widget.model_id}
        return bundle
