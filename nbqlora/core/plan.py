"""The plan: every number that a run will use, with the reason for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain
from nbqlora.core.saving import SavingNeeds
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, LayerPolicy, MemoryCategory, ModelSpec


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One number of the plan. ``because`` says why it is this one, and what the runner-up would cost."""

    name: str
    value: str
    because: str = ""


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Predicted bytes at the peak, by category."""

    by_category: Mapping[MemoryCategory, int]

    @property
    def total_bytes(self) -> int:
        """What ``max_memory_allocated`` is predicted to read (process RAM on a CPU)."""
        return sum(self.by_category.values())


@dataclass(frozen=True, kw_only=True)
class Probed:
    """What the longest micro-batch took, tried before the first step.

    Args:
        tokens: that went through the model, padding left out.
        peak_bytes: the most that existed, of the whole run, as ``max_memory_allocated`` counts it.
        seconds: of its forward and backward.
        total_seconds: of all that the probe did.
    """

    tokens: int
    peak_bytes: int
    seconds: float
    total_seconds: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Plan(Displayed):
    """What will run, where, and why.

    Args:
        dtype: arithmetic of the forward and backward: ``bf16``, ``fp16`` or ``fp32``.
        layer_policies: one for each decoder layer, first to last.
        usable_bytes: the most that the run may allocate.
        n_cards: that train together, on all machines; memory and micro-batches are those of one of them.
        n_nodes: machines.
        shards: cards over which each layer's NF4 weights are split (FSDP2), all that train together; 1: each has all.
        step_rows: rows, or packs, of a step of all cards; 0 where micro-batches and cards give it.
        sent_bytes: of gradients, that each card sends in a step.
        gathered_bytes: of layers' weights, that each card sends in a step where they are split.
        step_seconds: forecast of one optimizer step; None without a measured rate.
        total_steps: optimizer steps of the whole run.
        loss_chunk_tokens: supervised tokens that the head loss handles at once.
        mlp_tile_tokens: tokens that an MLP which is computed again handles at once; 0 for all of a micro-batch.
        offload_embedding: the input embedding is in host memory.
        host_bytes: pinned host memory for the inputs of layers that offload.
        disk_bytes: of the adapter.
        saving: what keeping the result takes; None where nobody asked.
        probed: what a probe step found; ``budget`` stays what was predicted.
        unknowns: what the plan does not know, said rather than guessed.
    """

    model: ModelSpec
    device: DeviceSpec
    data: DataStats
    dtype: str
    load_in_4bit: bool
    micro_batch_size: int
    gradient_accumulation_steps: int
    max_length: int
    layer_policies: tuple[LayerPolicy, ...]
    loss_chunk_tokens: int
    total_steps: int
    step_seconds: float | None
    usable_bytes: int
    budget: MemoryBudget
    output_dir: str
    disk_bytes: int
    n_cards: int = 1
    n_nodes: int = 1
    shards: int = 1
    step_rows: int = 0
    sent_bytes: int = 0
    gathered_bytes: int = 0
    mlp_tile_tokens: int = 0
    offload_embedding: bool = False
    host_bytes: int = 0
    saving: SavingNeeds | None = None
    probed: Probed | None = None
    decisions: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()
    unknowns: tuple[str, ...] = ()

    @property
    def predicted_peak_bytes(self) -> int:
        """Predicted peak of the run."""
        return self.budget.total_bytes

    @property
    def most_tokens(self) -> int:
        """Tokens of the longest row of a micro-batch; rows that are laid end to end are one."""
        longest = self.max_length if self.data.layout is BatchLayout.PACKED else self.data.max_tokens
        return longest * (1 if self.data.layout is BatchLayout.PADDED else self.micro_batch_size)

    @property
    def effective_batch_size(self) -> int:
        """Rows, or packs, per optimizer step."""
        return self.step_rows or self.micro_batch_size * self.gradient_accumulation_steps * self.n_cards

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**plain(self), "budget": plain(self.budget.by_category)}

    def __repr__(self) -> str:
        return (
            f"Plan({self.model.name} -> {self.device.name}, {self.dtype}, {self.micro_batch_size} x "
            f"{self.max_length} tokens, accumulation {self.gradient_accumulation_steps}, {self.total_steps} steps)"
        )


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One change made to a loaded model, or one that was looked at and not made (``new`` is then "")."""

    path: str
    old: str
    new: str
    because: str


@dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An adapter on disk, in PEFT's format."""

    path: str
    n_bytes: int
    sha256: str = field(repr=False)
