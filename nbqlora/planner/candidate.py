"""One way to run, with what it would cost."""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.plan import MemoryBudget
from nbqlora.planner.estimate import Memory
from nbqlora.planner.mix import Mix
from nbqlora.planner.pace import Pace


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run: a device batch, an accumulation, and what the layers keep.

    Args:
        memory, pace: what other mixes of the same batch would cost.
        twice: layers that are computed twice, as :meth:`Pace.twice` counts them.
        host_bytes: host memory for inputs that are offloaded.
        loss_chunk_tokens: supervised tokens whose logits exist at once.
    """

    micro_batch_size: int
    accumulation: int
    mix: Mix
    memory: Memory
    pace: Pace
    twice: float
    budget: MemoryBudget
    host_bytes: int
    step_seconds: float | None
    loss_chunk_tokens: int
