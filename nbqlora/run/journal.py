"""The events of a run, as they happen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from time import perf_counter

from nbqlora.core.events import Event, NoteEvent, Observer, PhaseEvent, StepEvent


class Journal:
    """Collects the events, numbers their time, and passes them on.

    Args:
        called: when the cell was run, or the function called, by ``perf_counter``, which all processes of a machine
            share; None for now.
    """

    def __init__(self, observe: Observer | None, called: float | None = None) -> None:
        self._observe, self._begun = observe, perf_counter() if called is None else called
        self.called = self._begun
        self.events: list[Event] = []
        self.parts: tuple[int, ...] = (0,)

    def restore(self, events: Iterable[Event], seconds: float, parts: Iterable[int]) -> None:
        """Put the earlier parts of a resumed run in front; the clock goes on from theirs.

        The observer is not shown them again.

        Args:
            seconds: how long those parts took.
            parts: the step after which each part began, this one's last.
        """
        self._begun -= seconds
        now = [replace(e, elapsed_seconds=e.elapsed_seconds + seconds) for e in self.events]
        self.events, self.parts = [*events, *now], tuple(parts)

    def clock(self) -> float:
        """Seconds since the run began, without the time between its parts."""
        return perf_counter() - self._begun

    def since_call(self) -> float:
        """Seconds since the cell was run, or the function called: what ``max_minutes`` limits."""
        return perf_counter() - self.called

    def emit(self, event: Event) -> None:
        """Keep an event and show it to the observer."""
        self.events.append(event)
        if self._observe is not None:
            self._observe(event)

    def phase(self, phase: str, detail: str = "") -> None:
        """The run enters a phase."""
        self.emit(PhaseEvent(phase=phase, detail=detail, elapsed_seconds=self.clock()))

    def note(self, text: str) -> None:
        """Something to say that no other event says."""
        self.emit(NoteEvent(text=text, elapsed_seconds=self.clock()))

    def steps(self) -> list[StepEvent]:
        """The optimizer steps so far."""
        return [e for e in self.events if isinstance(e, StepEvent)]

    def tokens_per_second(self) -> float | None:
        """Tokens over wall time; the first step of each part, which holds warm-up, counts only without others."""
        steps = self.steps()
        counted = [e for e in steps if e.step - 1 not in self.parts] or steps
        seconds = sum(e.seconds for e in counted)
        return sum(e.n_tokens for e in counted) / seconds if seconds else None
