"""What is left of a run, and what the memory looks like: values without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbqlora.core.display import Displayed
from nbqlora.core.events import EvalEvent, Event, StepEvent
from nbqlora.core.memory_profile import MemoryProfile
from nbqlora.core.plain import plain
from nbqlora.core.plan import Plan, Replacement, SavedAdapter
from nbqlora.core.specs import MemoryCategory
from nbqlora.core.units import format_bytes

Status = Literal["done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Report(Displayed):
    """The outcome of a run.

    Args:
        events: everything that happened, in order.
        tokens_per_second: tokens through the model over the wall time of the steps, the first step left out
            when there are more (it holds warm-up); None before a step was taken.
        measured_peak_bytes: highest memory allocated on the card while training; resident RAM on a CPU.
        rank_peaks: of several processes that trained together each one's peak, by rank; the highest is
            ``measured_peak_bytes``. () for one.
        memory: that by phase and by holder, of rank 0; None where nothing was loaded.
        seconds: wall time from the first look to the saved adapter.
        replacements: what was changed on the loaded model, and what was left as it was, with reasons.
        versions: of the libraries that took part.
    """

    name: str
    plan: Plan
    status: Status
    events: tuple[Event, ...]
    tokens_per_second: float | None
    measured_peak_bytes: int
    seconds: float
    adapter: SavedAdapter | None
    replacements: tuple[Replacement, ...] = ()
    versions: Mapping[str, str] | None = None
    memory: MemoryProfile | None = None
    reason: str = ""
    rank_peaks: tuple[int, ...] = ()

    @property
    def predicted_peak_bytes(self) -> int:
        """What the plan said the peak would be."""
        return self.plan.predicted_peak_bytes

    @property
    def steps(self) -> tuple[StepEvent, ...]:
        """The optimizer steps taken."""
        return tuple(e for e in self.events if isinstance(e, StepEvent))

    @property
    def evals(self) -> tuple[EvalEvent, ...]:
        """The evaluations made."""
        return tuple(e for e in self.events if isinstance(e, EvalEvent))

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "measured_peak_bytes": self.measured_peak_bytes,
            "rank_peaks": list(self.rank_peaks),
            "memory": None if self.memory is None else self.memory.as_dict(),
            "adapter": plain(self.adapter),
            "versions": plain(self.versions or {}),
            "replacements": plain(self.replacements),
            "plan": self.plan.as_dict(),
            "events": [e.as_dict() for e in self.events],
        }

    def __repr__(self) -> str:
        loss = f", loss {self.steps[-1].loss:.3f}" if self.steps else ""
        return f"Report({self.name}: {self.status}, {len(self.steps)} steps{loss})"


@dataclass(frozen=True, kw_only=True)
class CardNow:
    """One of several cards.

    Args:
        own_bytes: what this process has of it; None where that is not known.
        workers_bytes: what processes have of it that train for a run of nbqlora, of this notebook or another; likewise.
    """

    name: str
    total_bytes: int
    used_bytes: int
    own_bytes: int | None
    workers_bytes: int | None


@dataclass(frozen=True, kw_only=True, repr=False)
class VramReport(Displayed):
    """Memory now, of the training device, RAM and disk.

    Args:
        kind: ``"cuda"``, or ``"cpu"`` when there is no usable card; then the device is the machine's RAM.
        by_category: used bytes of the device by who holds them; sums to ``used_bytes``.
        peak_bytes: highest that this process allocated since it started; 0 when torch has not used the card.
        reclaimable: what of it is given back on demand: torch's cache, and what a finished run still holds.
        measured_by: where the figures come from: ``torch``, ``nvml`` (torch has not touched the card) or ``os``.
        notes: what a reader should know ("2 cards, this is card 0").
        cards: each of them, in CUDA's order, where there are several; () where there is one.
    """

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    peak_bytes: int
    by_category: Mapping[MemoryCategory, int]
    host_total_bytes: int
    host_free_bytes: int
    process_bytes: int
    disk_free_bytes: int
    disk_path: str
    measured_by: Literal["torch", "nvml", "os"]
    reclaimable: tuple[MemoryCategory, ...] = (MemoryCategory.CACHE,)
    notes: tuple[str, ...] = ()
    cards: tuple[CardNow, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        return f"VramReport({self.name}: {format_bytes(self.free_bytes)} free of {format_bytes(self.total_bytes)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(Displayed):
    """Answers to the same prompts, before and after training; each row is ``(prompt, base, tuned)``."""

    rows: tuple[tuple[str, str, str], ...]

    def __repr__(self) -> str:
        return f"Comparison({len(self.rows)} prompt{'s' if len(self.rows) != 1 else ''})"


class Answer(str):
    """A model's answer: text, which IPython shows with its line breaks instead of as a quoted literal."""

    __slots__ = ()

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))
