"""The highest memory of a stretch of work: what a report sets beside the plan's prediction.

torch keeps that figure for a card and can reset it. A process's resident memory has one high-water mark for
its whole life, so a thread samples it as well: when the mark rises during the stretch it is exact, however
short the peak was; when an earlier stretch went higher, the samples are what there is.

:meth:`PeakMeter.take` divides a stretch into pieces. On a card each piece is exact, for torch's figure is reset
between them; :func:`highest_before_resets` remembers what such resets forget. In RAM a piece has its samples.
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any, Literal

from nbqlora.memory.host import peak_resident_bytes, resident_bytes

_INTERVAL_SECONDS = 0.05
_before_resets = 0
_on_card: weakref.WeakSet[PeakMeter] = weakref.WeakSet()


class PeakMeter:
    """Highest bytes allocated on the current card, or resident in RAM on a CPU, from ``start`` to ``stop``.

    On a card ``start`` and ``take`` reset torch's peak statistics; other meters that run are told what it was.
    """

    def __init__(self, kind: Literal["cuda", "cpu"]) -> None:
        self.kind = kind
        self._highest = 0
        self._sampled = 0  # since the last take
        self._lock = threading.Lock()
        self._mark = 0
        self._running = False
        self._stopped = threading.Event()
        self._sampler: threading.Thread | None = None
        self._resident = _Resident()

    def start(self) -> None:
        """Begin, or begin again."""
        self.stop()
        self._highest, self._sampled, self._running = 0, 0, True
        if self.kind == "cuda":
            _reset_peak()
            _on_card.add(self)
            return
        self._mark = peak_resident_bytes()
        self._sampled = self._resident.read()
        self._stopped.clear()
        self._sampler = threading.Thread(target=self._sample, name="nbqlora-peak", daemon=True)
        self._sampler.start()

    def read(self) -> int:
        """The peak so far in bytes; after ``stop``, that of the stretch; 0 before ``start``."""
        if self._running:
            self._highest = max(self._highest, self._sampled, self._now())
        return self._highest

    def take(self) -> tuple[int, int]:
        """Bytes of the peak since the last ``take`` (or ``start``), and bytes now. The stretch goes on."""
        now = _reset_peak() if self.kind == "cuda" else self._resident.read()
        with self._lock:
            peak, self._sampled = max(self._sampled, now), now
        self._highest = max(self._highest, peak)
        return peak, now

    def stop(self) -> None:
        """End; may be called again."""
        self._stopped.set()
        if self._sampler:
            self._sampler.join()
            self._sampler = None
        self.read()
        self._running = False
        _on_card.discard(self)

    def note(self, peak_bytes: int) -> None:
        """A peak that somebody else saw."""
        with self._lock:
            self._sampled = max(self._sampled, peak_bytes)

    def _now(self) -> int:
        if self.kind == "cuda":
            return allocated()[0]
        mark = peak_resident_bytes()
        return mark if mark > self._mark else self._resident.read()

    def _sample(self) -> None:
        while not self._stopped.wait(_INTERVAL_SECONDS):
            self.note(self._resident.read())


def highest_before_resets() -> int:
    """The most that torch had allocated on a card when a meter reset its figure; 0 where none has."""
    return _before_resets


def bytes_now(kind: Literal["cuda", "cpu"]) -> int:
    """What a meter of this kind measures, now."""
    return allocated()[1] if kind == "cuda" else resident_bytes()


def _reset_peak() -> int:
    """Torch's peak begins again at the bytes now, which are returned."""
    import torch

    global _before_resets
    peak, now = allocated()
    _before_resets = max(_before_resets, peak)
    for meter in _on_card:
        meter.note(peak)
    torch.cuda.reset_peak_memory_stats()
    return now


def allocated() -> tuple[int, int]:
    """Torch's peak on the current card since the last reset, and its bytes now; (0, 0) before CUDA was started."""
    import torch

    # Nested: torch flattens and sorts hundreds of figures otherwise.
    found: dict[str, Any] = torch.cuda.memory.memory_stats_as_nested_dict()
    if not found:  # CUDA has not been started
        return 0, 0
    allocated = found["allocated_bytes"]["all"]
    return int(allocated["peak"]), int(allocated["current"])


class _Resident:
    """Resident bytes of this process from a file that stays open: 1.5 us on Linux, where asking anew takes 30."""

    def __init__(self) -> None:
        self._file: int | None = None
        self._page = 0
        try:
            self._file = os.open("/proc/self/statm", os.O_RDONLY)
        except OSError:
            return
        self._page = os.sysconf("SC_PAGE_SIZE")
        weakref.finalize(self, os.close, self._file)

    def read(self) -> int:
        if self._file is None:
            return resident_bytes()
        return int(os.pread(self._file, 64, 0).split()[1]) * self._page
