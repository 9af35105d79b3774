"""What happens during a run, as values. Views observe them; nothing in the training loop knows a view."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbqlora.core.data_report import DataReport
from nbqlora.core.plain import plain
from nbqlora.core.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Event:
    """Base of all events; ``elapsed_seconds`` counts from the start of training."""

    elapsed_seconds: float

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, with the event's kind; a figure that is not finite is None."""
        return {"kind": type(self).__name__, **plain(self)}


@dataclass(frozen=True, kw_only=True)
class PhaseEvent(Event):
    """The run entered a phase: look, plan, load, train, eval, save."""

    phase: str
    detail: str = ""


@dataclass(frozen=True, kw_only=True)
class DataEvent(Event):
    """The data was read and counted; nothing was planned yet."""

    report: DataReport

    def as_dict(self) -> dict[str, Any]:
        """Counts only; the rows' text is not copied."""
        return {"kind": type(self).__name__, "elapsed_seconds": self.elapsed_seconds, "report": self.report.as_dict()}


@dataclass(frozen=True, kw_only=True)
class PlannedEvent(Event):
    """The plan stands; nothing was loaded yet."""

    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        """The plan itself stands once, in the report."""
        return {"kind": type(self).__name__, "elapsed_seconds": self.elapsed_seconds}


@dataclass(frozen=True, kw_only=True)
class StepEvent(Event):
    """One optimizer step.

    Args:
        loss: mean loss per supervised token of the step's batches.
        n_tokens: tokens that went through the model in this step, padding left out.
        seconds: wall time of the step.
        peak_bytes: highest memory since the run began: allocated on a card, resident in RAM on a CPU.
        total_steps: steps that the run will take.
    """

    step: int
    total_steps: int
    loss: float
    learning_rate: float
    grad_norm: float | None
    n_tokens: int
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class EvalEvent(Event):
    """Mean loss per supervised token on the eval rows."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class SavedEvent(Event):
    """Something was written and synced."""

    step: int
    path: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class StoppedEvent(Event):
    """The run ends early, after the step named, with everything saved."""

    step: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class OomEvent(Event):
    """The card was full, and what was done so that the run goes on.

    Args:
        step: the optimizer step that was under way, or that a probe went before; 0 in an evaluation before the first.
        phase: where: probe, forward, backward, optimizer, eval.
        asked_bytes: what the allocation that failed asked for; None when it is not known.
        action: what runs from now on, in words ("the loss takes 64 tokens at once").
    """

    step: int
    phase: str
    asked_bytes: int | None
    action: str


@dataclass(frozen=True, kw_only=True)
class NoteEvent(Event):
    """Something that the user should know and that no other event says."""

    text: str


Observer = Callable[[Event], None]
