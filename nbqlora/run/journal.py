"""The events of a run, as they happen."""

from __future__ import annotations

from time import perf_counter

from nbqlora.core.events import Event, NoteEvent, Observer, PhaseEvent, StepEvent


class Journal:
    """Collects the events, numbers their time, and passes them on."""

    def __init__(self, observe: Observer | None) -> None:
        self._observe, self._begun = observe, perf_counter()
        self.events: list[Event] = []

    def clock(self) -> float:
        """Seconds since the run began."""
        return perf_counter() - self._begun

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
        """Tokens over wall time; the first step, which holds warm-up, counts only alone."""
        counted = self.steps()[1:] or self.steps()
        seconds = sum(e.seconds for e in counted)
        return sum(e.n_tokens for e in counted) / seconds if seconds else None
