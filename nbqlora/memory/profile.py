"""Where a run's memory goes, by phase and by holder, while it runs and for less than 1 % of its time.

A phase ends where the next one is entered. Only then torch's counters are read: the peak since the last boundary, which
is reset, and what is allocated. Nothing is emptied, synchronised or traced, and the allocator counts when the host asks
for memory, so the figures are those of the phase although the card may lag behind. Forward and backward of a captured
step are replayed without the allocator, so they are one phase, ``step``, whose peak is that of its capture.

On a CPU the figures are resident bytes of the process, read at each boundary and by a thread every 50 ms: a peak that
is shorter is missed by its phase, and seen by the whole stretch where it was the highest of the process's life.

Holders are counted once, from the tensors themselves, by whoever knows them (:meth:`Profile.hold`); what they leave of
the peak are activations, the loss among them.

One object is shared: a view reads :func:`latest`, a report keeps its :meth:`~Profile.snapshot`.

A boundary takes 3.3 us on a CPU (2 cores, torch 2.13, ``python tests/bench/profile_overhead.py``); the three of a tiny
model's step, 27 ms there, are 0.04 % of it. What the sampling thread takes is lost in the noise.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any, Literal

from nbqlora.core.memory_profile import PHASES, MemoryProfile, MemorySample, PhaseMemory
from nbqlora.core.specs import MemoryCategory
from nbqlora.memory.peak import PeakMeter

MAX_SAMPLES = 600
_FIRST_WIDTH_SECONDS = 0.25

_latest: weakref.ref[Profile] | None = None


def latest() -> Profile | None:
    """The profile of the run that began last in this process, while something still holds it."""
    return _latest() if _latest is not None else None


class Profile:
    """Memory of one run.

    Args:
        kind: where the run computes.
        base_bytes: what stands before the run and is none of its holders: on a CPU, the process itself.
        clock: seconds.
    """

    def __init__(
        self, kind: Literal["cuda", "cpu"], *, base_bytes: int = 0, clock: Callable[[], float] = perf_counter
    ) -> None:
        self.kind, self.phase = kind, ""
        self._alone, self._highest = False, 0  # of what is measured now; views look, and so divide it into pieces
        self._base_bytes, self._clock, self._begun = base_bytes, clock, clock()
        self._meter = PeakMeter(kind)
        self._lock = threading.RLock()  # a view's thread looks while the run goes on
        self._phases: dict[str, list[int]] = {}
        self._timeline = _Timeline()
        self._owner: weakref.ref[Any] | None = None
        self._held: dict[MemoryCategory, int] = {}
        self._most: dict[MemoryCategory, int] = {}

    def __repr__(self) -> str:
        return f"Profile({self.kind}, {self.phase or 'not running'}, {len(self._phases)} phases)"

    def __enter__(self) -> Profile:
        self.start("load")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self, phase: str) -> None:
        """Begin a stretch: :meth:`read` counts from here. Phases that were measured before stay."""
        global _latest
        with self._lock:
            self._close()
            self._meter.start()
            self.phase = phase
        _latest = weakref.ref(self)

    def enter(self, phase: str) -> None:
        """The phase that runs ends, and this one begins; not outside a stretch, nor where it runs already, or alone."""
        if phase != self.phase and self.phase and not self._alone:
            with self._lock:
                self._close()
                self.phase = phase

    @contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """A phase inside another one, which goes on afterwards."""
        before = self.phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def measured(self, phase: str, work: Callable[[], None]) -> int:
        """Do this as a phase of its own, in which no other begins; the bytes of its peak, 0 outside a stretch."""
        before = self.phase
        with self._lock:
            self._close()
            self.phase, self._alone, self._highest = phase if before else "", True, 0
        try:
            work()
        finally:
            with self._lock:
                self._close()
                self.phase, self._alone = before, False
        return self._highest

    def read(self) -> int:
        """Bytes of the peak since the last :meth:`start`; after :meth:`stop`, of that stretch."""
        return self._meter.read()

    def stop(self) -> None:
        """End the stretch; may be called again."""
        with self._lock:
            self._close()
            self.phase = ""
            self._meter.stop()

    def hold(self, owner: Any, held: Mapping[MemoryCategory, int]) -> None:
        """What the run's tensors hold now.

        Args:
            owner: when it is gone, nothing is held.
            held: counted bytes by holder, in place of those told before.
        """
        self._owner, self._held = weakref.ref(owner), dict(held)
        self._most |= {c: max(n, self._most.get(c, 0)) for c, n in held.items()}

    def holdings(self) -> dict[MemoryCategory, int]:
        """Counted bytes by holder, while their owner lives."""
        return dict(self._held) if self._owner is not None and self._owner() is not None else {}

    def snapshot(self) -> MemoryProfile:
        """All that was measured so far, as a value."""
        with self._lock:
            self._close()
            found = [PhaseMemory(phase=p, peak_bytes=v[0], after_bytes=v[1]) for p, v in self._phases.items()]
            samples = self._timeline.samples()
        order = {phase: i for i, phase in enumerate(PHASES)}
        phases = tuple(sorted(found, key=lambda p: order.get(p.phase, len(order))))
        profile = MemoryProfile(kind=self.kind, phases=phases, by_category={}, samples=samples)
        peak = profile.highest.peak_bytes if profile.highest is not None else 0
        return replace(profile, by_category=self._by_category(peak))

    def _by_category(self, peak_bytes: int) -> dict[MemoryCategory, int]:
        if not peak_bytes:
            return {}
        known = {MemoryCategory.CONTEXT: self._base_bytes, **self._most}
        rest = peak_bytes - sum(known.values())
        return {c: n for c, n in (known | {MemoryCategory.ACTIVATIONS: max(0, rest)}).items() if n}

    def _close(self) -> None:
        """Read what the phase that runs has taken."""
        if not self.phase:
            return
        peak, now = self._meter.take()
        self._highest = max(self._highest, peak)
        found = self._phases.get(self.phase)
        if found is None:
            self._phases[self.phase] = [peak, now]
        else:
            found[0], found[1] = max(found[0], peak), now
        self._timeline.add(self._clock() - self._begun, self.phase, peak, now)


class _Timeline:
    """Peaks over time: one a phase and stretch of time, which doubles whenever there are too many."""

    def __init__(self) -> None:
        self._width = _FIRST_WIDTH_SECONDS
        self._rows: dict[tuple[int, str], list[float]] = {}

    def add(self, at: float, phase: str, peak: int, after: int) -> None:
        key = (int(at / self._width), phase)
        row = self._rows.get(key)
        if row is None:
            self._rows[key] = [at, peak, after]
            if len(self._rows) > MAX_SAMPLES:
                self._widen()
        else:
            row[0], row[1], row[2] = at, max(row[1], peak), after

    def samples(self) -> tuple[MemorySample, ...]:
        rows = sorted((at, phase, peak, after) for (_, phase), (at, peak, after) in self._rows.items())
        return tuple(
            MemorySample(elapsed_seconds=at, phase=phase, peak_bytes=int(peak), after_bytes=int(after))
            for at, phase, peak, after in rows
        )

    def _widen(self) -> None:
        while len(self._rows) > MAX_SAMPLES // 2:
            old, self._rows, self._width = self._rows, {}, 2 * self._width
            for (_, phase), (at, peak, after) in old.items():
                key = (int(at / self._width), phase)
                row = self._rows.setdefault(key, [at, peak, after])
                row[0], row[1], row[2] = at, max(row[1], peak), after
