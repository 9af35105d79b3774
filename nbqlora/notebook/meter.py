"""Memory while cells run: a meter that updates under later cells, and a line after each cell.

The meter is a display with a ``display_id`` that a thread updates, which works while a cell runs, in whichever cell
stands below. Colab replays all output when a page is opened again, so it says nothing while nothing changes, and not
more than 2 kB every 1.5 s. It stops by itself: when no cell has run for two minutes, or when another one is started.

The line after a cell compares the memory with that before it. Its peak is torch's own on a card, reset before each
cell; in RAM it is sampled.
"""

from __future__ import annotations

import contextvars
import threading
from time import monotonic
from typing import Any
from weakref import WeakKeyDictionary

from IPython.display import display

from nbqlora.core.report import VramReport
from nbqlora.core.units import MIB, format_bytes
from nbqlora.memory.peak import PeakMeter, allocated, bytes_now
from nbqlora.memory.probe import cuda_started, vram
from nbqlora.view.memory import meter_html, vram_text

INTERVAL_SECONDS = 1.5
IDLE_SECONDS = 120.0


class Watch:
    """Shows memory until nothing has happened for a while.

    Args:
        shell: its cells count as something that happens.
        idle_seconds: how long after the last cell it stops.
    """

    def __init__(self, shell: Any, *, idle_seconds: float = IDLE_SECONDS) -> None:
        self._shell, self._idle_seconds = shell, idle_seconds
        self._running = True  # the cell that starts it
        self._ended = monotonic()
        self._stopped = threading.Event()
        self._said = ""
        self._why = ""
        self._handle = display(self._bundle(vram()), raw=True, display_id=True)
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)
        context = contextvars.copy_context()  # later kernels find the cell that an output belongs to there
        self._thread = threading.Thread(target=context.run, args=(self._update,), name="nbqlora-watch", daemon=True)
        self._thread.start()

    def stop(self, why: str = "stopped") -> None:
        """Say so, and update no more; may be called again."""
        if not self._stopped.is_set():
            self._why = why
            self._stopped.set()
        self._thread.join()

    @property
    def stopped(self) -> bool:
        """It updates no more."""
        return not self._thread.is_alive()

    def _begin(self, *_: Any) -> None:
        self._running = True

    def _end(self, *_: Any) -> None:
        self._running, self._ended = False, monotonic()

    def _update(self) -> None:
        while not self._stopped.wait(min(INTERVAL_SECONDS, self._idle_seconds)):
            if not self._running and monotonic() - self._ended >= self._idle_seconds:
                self._why = f"stopped: no cell ran for {self._idle_seconds:.0f} s"
                break
            self._send()
        for event, callback in (("pre_run_cell", self._begin), ("post_run_cell", self._end)):
            self._shell.events.unregister(event, callback)
        self._send()

    def _send(self) -> None:
        bundle = self._bundle(vram())
        if bundle["text/plain"] != self._said:
            self._handle.update(bundle, raw=True)
            self._said = bundle["text/plain"]

    def _bundle(self, report: VramReport) -> dict[str, str]:
        state = self._why or "updates while cells run"
        text = f"{vram_text(report)} · {state}"
        return {"text/plain": text, "text/html": f"{meter_html(report)}<div style='opacity:.8'>{state}</div>"}


class AfterCells:
    """Prints delta and peak after each cell.

    Args:
        shell: whose cells.
    """

    def __init__(self, shell: Any) -> None:
        self._shell = shell
        self._meter: PeakMeter | None = None
        self._before = 0
        shell.events.register("pre_run_cell", self._begin)
        shell.events.register("post_run_cell", self._end)

    def stop(self) -> None:
        """Print no more."""
        self._shell.events.unregister("pre_run_cell", self._begin)
        self._shell.events.unregister("post_run_cell", self._end)
        if self._meter is not None:
            self._meter.stop()

    def _begin(self, *_: Any) -> None:
        self._meter = PeakMeter("cuda" if cuda_started() else "cpu")
        self._before = bytes_now(self._meter.kind)
        self._meter.start()

    def _end(self, *_: Any) -> None:
        if self._meter is None:  # the cell that switched it on
            return
        meter, self._meter = self._meter, None
        meter.stop()
        kind, before, peak = meter.kind, self._before, meter.read()
        if kind == "cpu" and cuda_started():  # by this cell
            kind, before, peak = "cuda", 0, allocated()[0]
        now = bytes_now(kind)
        print(cell_line(kind, before, now, peak))  # noqa: T201


def cell_line(kind: str, before: int, now: int, peak: int) -> str:
    """``vram  +1.2 GiB, now 5.6 GiB, peak 7.3 GiB``."""
    change = now - before
    sign = "+" if change >= 0 else "-"
    delta = f"{sign}{format_bytes(abs(change))}" if abs(change) >= MIB else "+0 MiB"
    word = "vram" if kind == "cuda" else "ram "
    return f"{word}  {delta}, now {format_bytes(now)}, peak {format_bytes(max(peak, now))}"


_watches: WeakKeyDictionary[Any, Watch] = WeakKeyDictionary()
_after: WeakKeyDictionary[Any, AfterCells] = WeakKeyDictionary()


def watch(shell: Any) -> None:
    """Start a shell's meter; the one that runs already stops."""
    if shell in _watches:
        _watches[shell].stop("stopped: another meter was started")
    _watches[shell] = Watch(shell)


def after_cells(shell: Any, *, on: bool) -> None:
    """Switch the line after each cell on or off; again, it changes nothing."""
    if on and shell not in _after:
        _after[shell] = AfterCells(shell)
    elif not on and shell in _after:
        _after.pop(shell).stop()
