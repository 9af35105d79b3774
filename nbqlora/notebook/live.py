"""A run in a cell's output: a line that updates, charts below it, and at the end a page that reads anywhere.

Displays with a ``display_id`` are used rather than widgets: a headless run keeps their last state, while a widget's
saved text stays at its first. The line (400 B) goes out every second; the charts (12 kB at most) go out when their
bytes were earned, at a rate that Colab, which replays all output on reconnect, and a browser on this machine take
differently: there 60 kB a minute in all. The last state is always sent. A thread does it, so that a step of 40 s is
seen to live and the training loop only hands events over; it also reads the memory in use.

What it costs is measured in ``tests/notebook/test_live_budget.py``, below 1 % of the step time. In
static mode (``NBQLORA_DISPLAY=static``, ``--static``, Kaggle's Batch runs, which have no front end) nothing updates:
the data, the plan, then the result.
"""

from __future__ import annotations

import contextvars
import json
import os
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

from IPython.display import display

from nbqlora.core.display import Displayed
from nbqlora.core.events import DataEvent, Event, PhaseEvent, PlannedEvent
from nbqlora.memory.host import resident_bytes
from nbqlora.run import Run
from nbqlora.view.progress import Progress

Bundle = Mapping[str, str | bytes]

_numbers = count(1)


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How much a view may send.

    Args:
        status_seconds: between two lines.
        charts_seconds: between two blocks of charts, at least.
        bytes_per_second: what is earned for charts and whole pages; ``saved_bytes`` of it at most are kept for a burst.
    """

    status_seconds: float = 1.0
    charts_seconds: float = 2.0
    bytes_per_second: float = 6000.0
    saved_bytes: float = 24_000.0


# In the worst minute 60 lines of 400 B, 12 kB earned and 12 kB saved up: 48 kB, and once the report and its picture.
COLAB = Pace(bytes_per_second=200.0, saved_bytes=12_000.0)


def pace_of(environ: Mapping[str, str]) -> Pace:
    """What the front end takes."""
    return COLAB if "COLAB_RELEASE_TAG" in environ else Pace()


def show(value: Displayed) -> None:
    """Display a value as text and HTML; the display holds strings, never the value."""
    display(_bundle(value), raw=True)


def _bundle(value: Displayed) -> Bundle:
    html = value._repr_html_()
    return {"text/plain": str(value), **({"text/html": html} if html else {})}


class _Place:
    """One output that can be written again."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown: Bundle | None = None

    @property
    def open(self) -> bool:
        return self._handle is not None

    def put(self, bundle: Bundle) -> None:
        """Write, unless that stands there already."""
        if bundle == self._shown:
            return
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=f"nbq{os.getpid()}-{next(_numbers)}")
        else:
            self._handle.update(bundle, raw=True)
        self._shown = bundle

    def leave(self, bundle: Bundle) -> None:
        """Write for the last time; what comes next stands below."""
        self.put(bundle)
        self._handle = self._shown = None


class LiveView:
    """Observes one run.

    Args:
        name: the run's name.
        static: no updates.
    """

    def __init__(self, name: str, *, static: bool) -> None:
        self.progress = Progress(name)
        self._static, self._pace, self._begun = static, pace_of(os.environ), monotonic()
        self._status, self._charts = _Place(), _Place()
        self._earned, self._charted, self._changed = self._pace.saved_bytes, 0.0, False
        # An interrupt's handler comes back into a view that is drawing.
        self._lock = threading.RLock()
        self._over = threading.Event()
        # ipykernel 7 keeps in the context which cell an output belongs to.
        ticking = contextvars.copy_context().run
        self._ticker = threading.Thread(target=ticking, args=(self._tick,), name="nbqlora-view", daemon=True)
        self._ticker.start()

    def __call__(self, event: Event) -> None:
        """Take an event; phases are shown at once, the rest when it is time."""
        with self._lock:
            self.progress.take(event, self._clock())
            self._changed = True
            if isinstance(event, DataEvent | PlannedEvent):
                page = _bundle(event.report if isinstance(event, DataEvent) else event.plan)
                self._earned -= _size(page)
                self._status.leave(page)
            elif isinstance(event, PhaseEvent) and not self._static:
                self._draw()

    def finish(self, run: Run) -> None:
        """Put the result where the progress was."""
        self._stop()
        self._status.leave(_bundle(run.report))
        if run.report.steps:
            from nbqlora.view.figures import run_figure

            shift = self.progress.shift
            held = [(at + shift, n_bytes) for at, n_bytes in self.progress.memory]
            picture = run_figure(run.report, held)._repr_png_()
            self._charts.leave({"image/png": picture, "text/plain": f"loss and memory of {run.name}"})
        elif self._charts.open:
            self._charts.leave({"text/plain": "no step was taken"})

    def fail(self) -> None:
        """Leave the last state standing above the error, marked as failed; nothing where nothing was begun."""
        self._stop()
        self.progress.phase = "failed"
        if self._status.open:
            self._status.leave(self._line())
        if self._charts.open:
            self._charts.leave(self._block())

    def _stop(self) -> None:
        self._over.set()
        self._ticker.join()

    def _clock(self) -> float:
        return monotonic() - self._begun

    def _tick(self) -> None:
        while not self._over.wait(self._pace.status_seconds):
            with self._lock:
                self.progress.sample(self._clock(), self._memory())
                if not self._static and self.progress.phases and not self._over.is_set():
                    self._draw()

    def _memory(self) -> int | None:
        plan = self.progress.plan
        # Where several train, they are other processes than this one; their steps tell the fullest one's peak.
        return None if plan is None or plan.n_cards > 1 else _in_use(plan.device.kind)

    def _draw(self) -> None:
        self._status.put(self._line())
        now = self._clock()
        training = any(phase == "train" for _, phase in self.progress.phases)
        if not training or not self._changed or now - self._charted < self._pace.charts_seconds:
            return
        self._earned += self._pace.bytes_per_second * (now - self._charted)
        self._earned, self._charted = min(self._earned, self._pace.saved_bytes), now
        block = self._block()
        if _size(block) <= self._earned:
            self._charts.put(block)
            self._earned, self._changed = self._earned - _size(block), False

    def _line(self) -> dict[str, str]:
        return {"text/plain": self.progress.text(), "text/html": self.progress.html()}

    def _block(self) -> dict[str, str]:
        return {"text/plain": self.progress.charts_text(), "text/html": self.progress.charts_html()}


def _size(bundle: Bundle) -> int:
    """Bytes, as a message spells it."""
    return len(json.dumps(dict(bundle), ensure_ascii=False).encode())


def _in_use(kind: str) -> int | None:
    """Bytes allocated on the card, None before torch has used it; resident in RAM on a CPU."""
    if kind == "cpu":
        return resident_bytes()
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_allocated())
