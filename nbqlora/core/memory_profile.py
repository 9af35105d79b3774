"""A run's memory as it was measured: by phase, by holder, and over time. Values without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from nbqlora.core.plain import plain
from nbqlora.core.specs import MemoryCategory

PHASES = ("load", "probe", "forward", "backward", "step", "optimizer", "eval", "save")
"""In the order of a run. ``probe`` is the longest micro-batch, tried before the first step; ``step`` is forward and
backward where they are captured and cannot be told apart."""


@dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """One phase, all the times that it ran.

    Args:
        peak_bytes: the most that was allocated within it (resident in RAM on a CPU).
        after_bytes: what was still allocated when it ended last.
    """

    phase: str
    peak_bytes: int
    after_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemorySample:
    """A short while of one phase; of a long run several of its turns.

    Args:
        elapsed_seconds: when it ended, from the profile's beginning.
    """

    elapsed_seconds: float
    phase: str
    peak_bytes: int
    after_bytes: int


@dataclass(frozen=True, kw_only=True)
class MemoryProfile:
    """What was measured.

    Args:
        kind: ``"cuda"``: bytes that torch allocated; ``"cpu"``: resident bytes of the process, sampled.
        phases: those that ran, in the order of :data:`PHASES`.
        by_category: who held the peak of training. What the counted holders leave of it is ``ACTIVATIONS``; the loss,
            which nothing counts, is among them.
        samples: the phases over time.
    """

    kind: Literal["cuda", "cpu"]
    phases: tuple[PhaseMemory, ...]
    by_category: Mapping[MemoryCategory, int]
    samples: tuple[MemorySample, ...] = ()

    @property
    def highest(self) -> PhaseMemory | None:
        """The phase of training with the highest peak; None before training began."""
        trained = [p for p in self.phases if p.phase not in ("load", "save")]
        return max(trained, key=lambda p: p.peak_bytes, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the samples."""
        return {"kind": self.kind, "phases": plain(self.phases), "by_category": plain(self.by_category)}
