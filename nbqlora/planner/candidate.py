"""One way to run, with what it would cost."""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import LayerPolicy


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run: a device batch, an accumulation, and how many layers keep everything."""

    micro_batch_size: int
    accumulation: int
    n_keep: int
    n_layers: int
    budget: MemoryBudget
    step_seconds: float | None

    @property
    def policies(self) -> tuple[LayerPolicy, ...]:
        """Kept layers stand last: the backward frees them before it recomputes the first one."""
        n = self.n_layers - self.n_keep
        return (LayerPolicy.RECOMPUTE,) * n + (LayerPolicy.KEEP,) * self.n_keep
