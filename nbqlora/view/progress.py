"""A run in progress: events in, one block of HTML or one line of text out.

Pure: it is fed events and asked for its picture, so live views, tests and static pages share it.
"""

from __future__ import annotations

from html import escape

from nbqlora.core.events import (
    EvalEvent,
    Event,
    NoteEvent,
    PhaseEvent,
    PlannedEvent,
    SavedEvent,
    StepEvent,
    StoppedEvent,
)
from nbqlora.core.plan import Plan
from nbqlora.core.units import format_bytes, format_minutes

PHASES = {
    "look": "looking at model, data and machine",
    "load": "loading",
    "train": "training",
    "stop": "stopping",
    "save": "saving",
    "copy": "copying",
}
SPARK_POINTS = 120


class Progress:
    """What is known of a run so far."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.plan: Plan | None = None
        self.phase = "starting"
        self.note = ""
        self.steps: list[StepEvent] = []
        self.evals: list[EvalEvent] = []

    def take(self, event: Event) -> None:
        """Account for one event."""
        match event:
            case PlannedEvent():
                self.plan = event.plan
            case PhaseEvent():
                self.phase = f"{PHASES.get(event.phase, event.phase)} {event.detail}".rstrip()
            case StepEvent():
                self.steps.append(event)
            case EvalEvent():
                self.evals.append(event)
            case NoteEvent():
                self.note = event.text
            case SavedEvent():
                self.note = f"saved {event.path} ({format_bytes(event.n_bytes)})"
            case StoppedEvent():
                self.note = f"stopped after step {event.step}: {event.reason}"

    @property
    def share(self) -> float:
        """Steps done, 0 to 1."""
        return self.steps[-1].step / self.steps[-1].total_steps if self.steps else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Seconds of training still to come, from the steps so far; the first one, a warm-up, counts only alone."""
        if not self.steps:
            return None
        counted = self.steps[1:] or self.steps
        mean = sum(e.seconds for e in counted) / len(counted)
        return mean * (self.steps[-1].total_steps - self.steps[-1].step)

    def figures(self) -> list[str]:
        """The numbers of the last step, each with its word."""
        if not self.steps:
            return []
        last = self.steps[-1]
        rate = last.n_tokens / last.seconds if last.seconds else 0.0
        words = [f"step {last.step}/{last.total_steps}", f"loss {last.loss:.3f}"]
        words += [f"eval {self.evals[-1].loss:.3f}"] if self.evals else []
        words += [f"{rate:,.0f} tokens/s", f"peak {format_bytes(last.peak_bytes)}"]
        if self.plan is not None:
            words[-1] += f" (plan {format_bytes(self.plan.predicted_peak_bytes)})"
        if self.eta_seconds:
            words.append(f"{format_minutes(self.eta_seconds)} left")
        return words

    def text(self) -> str:
        """One line."""
        return " · ".join([f"{self.name}: {self.phase}", *self.figures(), *([self.note] if self.note else [])])

    def html(self) -> str:
        """One block: phase, bar, figures, the loss as a curve; a few kB at most."""
        percent = f"{100 * self.share:.0f}"
        bar = (
            f'<div role="progressbar" aria-valuenow="{percent}" aria-valuemin="0" aria-valuemax="100" '
            'style="height:10px;border:1px solid var(--jp-border-color1,rgba(128,128,128,.6));border-radius:3px">'
            f'<div style="width:{percent}%;height:100%;background:#426EBD"></div></div>'
        )
        figures = escape(" · ".join(self.figures()))
        stop = "<em>■ stops after this step and saves</em>" if self.phase.startswith("training") else ""
        note = f'<div style="opacity:.8">{escape(self.note)}</div>' if self.note else ""
        return (
            f'<div style="max-width:640px;font-size:13px"><strong>{escape(self.name)}</strong>: {escape(self.phase)} '
            f"{stop}{bar}<div>{figures}</div>{self._curve()}{note}</div>"
        )

    def _curve(self) -> str:
        losses = [e.loss for e in self.steps][-SPARK_POINTS:]
        if len(losses) < 2:
            return ""
        low, high = min(losses), max(losses)
        span = (high - low) or 1.0
        points = " ".join(
            f"{400 * i / (len(losses) - 1):.0f},{44 - 40 * (loss - low) / span:.1f}" for i, loss in enumerate(losses)
        )
        label = f"loss from {losses[0]:.3f} to {losses[-1]:.3f} over {len(losses)} steps"
        return (
            f'<svg role="img" aria-label="{label}" viewBox="0 0 400 48" style="width:100%;max-width:400px;height:48px">'
            f'<polyline points="{points}" fill="none" stroke="#426EBD" stroke-width="2"/></svg>'
        )
