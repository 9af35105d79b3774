"""One way to run, with what it would cost."""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import LayerPolicy


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run: a device batch, an accumulation, and how many layers keep what.

    Args:
        twice: layers that are computed twice, as :meth:`Pace.twice` counts them.
        loss_chunk_tokens: supervised tokens whose logits exist at once.
    """

    micro_batch_size: int
    accumulation: int
    n_keep: int
    n_recompute_mlp: int
    n_layers: int
    twice: float
    budget: MemoryBudget
    step_seconds: float | None
    loss_chunk_tokens: int

    @property
    def n_recompute(self) -> int:
        """Layers that keep their input alone."""
        return self.n_layers - self.n_keep - self.n_recompute_mlp

    @property
    def policies(self) -> tuple[LayerPolicy, ...]:
        """What keeps the most stands last: the backward frees it before it recomputes the first layers."""
        return (
            (LayerPolicy.RECOMPUTE,) * self.n_recompute
            + (LayerPolicy.RECOMPUTE_MLP,) * self.n_recompute_mlp
            + (LayerPolicy.KEEP,) * self.n_keep
        )
