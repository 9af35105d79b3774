"""The highest memory of a stretch of work: what a report sets beside the plan's prediction.

torch keeps that figure for a card and can reset it. A process's resident memory has one high-water mark for
its whole life, so a thread samples it as well: when the mark rises during the stretch it is exact, however
short the peak was; when an earlier stretch went higher, the samples are what there is.
"""

from __future__ import annotations

import threading
from typing import Literal

from nbqlora.memory.host import peak_resident_bytes, resident_bytes

_INTERVAL_SECONDS = 0.05


class PeakMeter:
    """Highest bytes allocated on the current card, or resident in RAM on a CPU, from ``start`` to ``stop``.

    On a card ``start`` resets torch's peak statistics.
    """

    def __init__(self, kind: Literal["cuda", "cpu"]) -> None:
        self.kind = kind
        self._highest = 0
        self._sampled = 0  # written by the sampler alone
        self._mark = 0
        self._running = False
        self._stopped = threading.Event()
        self._sampler: threading.Thread | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        self.stop()
        self._highest, self._sampled, self._running = 0, 0, True
        if self.kind == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            return
        self._mark = peak_resident_bytes()
        self._sampled = resident_bytes()
        self._stopped.clear()
        self._sampler = threading.Thread(target=self._sample, name="nbqlora-peak", daemon=True)
        self._sampler.start()

    def read(self) -> int:
        """The peak so far in bytes; after ``stop``, that of the stretch; 0 before ``start``."""
        if self._running:
            self._highest = max(self._highest, self._sampled, self._now())
        return self._highest

    def stop(self) -> None:
        """End; may be called again."""
        self._stopped.set()
        if self._sampler:
            self._sampler.join()
        self.read()
        self._running = False

    def _now(self) -> int:
        if self.kind == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        mark = peak_resident_bytes()
        return mark if mark > self._mark else resident_bytes()

    def _sample(self) -> None:
        while not self._stopped.wait(_INTERVAL_SECONDS):
            self._sampled = max(self._sampled, resident_bytes())
