"""A run in a cell's output: one block that updates, and at its end a page that reads anywhere.

A display with a ``display_id`` is used rather than a widget: a headless run keeps its last state, while a
widget's saved text stays at its first. At most two updates a second (one on Colab, which replays all
output on reconnect); the last one is always sent. In static mode (``NBQLORA_DISPLAY=static``, ``--static``,
Kaggle's Batch runs, which have no front end) nothing updates: the data, the plan, then the result.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from time import monotonic
from typing import Any

from IPython.display import display

from nbqlora.core.display import Displayed
from nbqlora.core.events import DataEvent, Event, NoteEvent, PlannedEvent, StepEvent
from nbqlora.run import Run
from nbqlora.view.progress import Progress


def updates_per_second(environ: Mapping[str, str]) -> float:
    """How often a live block may change."""
    return 1.0 if "COLAB_RELEASE_TAG" in environ else 2.0


def show(value: Displayed) -> None:
    """Display a value as text and HTML; the display holds strings, never the value."""
    bundle = {"text/plain": str(value)}
    html = value._repr_html_()
    if html:
        bundle["text/html"] = html
    display(bundle, raw=True)


class LiveView:
    """Observes one run.

    Args:
        name: the run's name.
        static: no updates.
    """

    def __init__(self, name: str, *, static: bool) -> None:
        self._progress = Progress(name)
        self._static = static
        self._interval = 1 / updates_per_second(os.environ)
        self._sent = 0.0
        self._handle: Any = None

    def __call__(self, event: Event) -> None:
        """Take an event; draw when it is time."""
        self._progress.take(event)
        if isinstance(event, DataEvent | PlannedEvent):
            self._clear()
            show(event.report if isinstance(event, DataEvent) else event.plan)
        if self._static or isinstance(event, DataEvent):
            return
        due = monotonic() - self._sent >= self._interval
        if due or not isinstance(event, StepEvent | NoteEvent):
            self._draw()

    def finish(self, run: Run) -> None:
        """Put the result where the progress was."""
        report = run.report
        bundle = {"text/plain": str(report), "text/html": report._repr_html_() or ""}
        if self._handle is None:
            display(bundle, raw=True)
        else:
            self._handle.update(bundle, raw=True)
        if report.steps:
            figure = {"image/png": run.plot()._repr_png_(), "text/plain": f"loss and memory of {run.name}, by step"}
            display(figure, raw=True)

    def fail(self) -> None:
        """Leave the last state standing above the error, marked as failed; nothing where nothing was begun."""
        self._progress.phase = "failed"
        if self._handle is not None:
            self._draw()

    def _clear(self) -> None:
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)
            self._handle = None

    def _draw(self) -> None:
        bundle = {"text/plain": self._progress.text(), "text/html": self._progress.html()}
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)
        self._sent = monotonic()
