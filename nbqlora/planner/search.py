"""The ways to run that are worth a look: splits of a step into micro-batches, and how many layers keep what.

Not all pairs of numbers of layers: with a limit of memory the quickest of a split is found by arithmetic, since every
layer that recomputes more takes less memory and more time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from nbqlora.core.config import DEFAULT_EFFECTIVE_BATCH_SIZE, FinetuneConfig
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.planner.asked import layers_asked
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import Memory, memory_of, pace_of
from nbqlora.planner.fused import fused_family, not_captured_because
from nbqlora.planner.pace import Load, Pace

# How many layers keep everything, and how many all but their MLP's.
Layers = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """One split of a step into micro-batches, with what it costs."""

    rows: int
    accumulation: int
    n_layers: int
    memory: Memory
    pace: Pace

    def candidate(self, n_keep: int, n_recompute_mlp: int) -> Candidate:
        """With these layers."""
        n_recompute = self.n_layers - n_keep - n_recompute_mlp
        return Candidate(
            micro_batch_size=self.rows,
            accumulation=self.accumulation,
            n_keep=n_keep,
            n_recompute_mlp=n_recompute_mlp,
            n_layers=self.n_layers,
            twice=self.pace.twice(n_recompute, n_recompute_mlp),
            budget=self.memory.budget(n_keep, n_recompute_mlp),
            step_seconds=self.pace.seconds(n_recompute, n_recompute_mlp) if self.pace.measured else None,
            loss_chunk_tokens=self.memory.loss_chunk_tokens(n_keep, n_recompute_mlp),
        )

    def worth_a_look(self, limit: int) -> list[Layers]:
        """The quickest that fits, what one more kept layer would be, and the leanest."""
        found: list[Layers] = [(0, 0)]
        best = self._quickest(limit)
        if best is not None:
            keep, mlp = best
            more = [(keep + 1, mlp - 1)] if mlp else []
            more += [(keep + 1, mlp)] if keep + mlp < self.n_layers else []
            found += [best, *sorted(more, key=lambda layers: self.memory.total_bytes(*layers))[:1]]
        return list(dict.fromkeys(found))

    def _quickest(self, limit: int) -> Layers | None:
        """For each number of layers that are recomputed, as few MLPs as it takes; of these the quickest."""
        best: tuple[tuple[float, float], Layers] | None = None
        for n_recompute in range(self.n_layers + 1):
            if best is not None and self._slowness(n_recompute, 0) > best[0]:
                break
            mlp = self._fewest(n_recompute, limit)
            if mlp is not None:
                slowness = self._slowness(n_recompute, mlp)
                if best is None or slowness < best[0]:
                    best = slowness, (self.n_layers - n_recompute - mlp, mlp)
        return None if best is None else best[1]

    def _slowness(self, n_recompute: int, n_recompute_mlp: int) -> tuple[float, float]:
        seconds = self.pace.seconds(n_recompute, n_recompute_mlp) if self.pace.measured else 0.0
        return round(seconds, 4), self.pace.twice(n_recompute, n_recompute_mlp)

    def _fewest(self, n_recompute: int, limit: int) -> int | None:
        """The fewest MLPs to recompute beside ``n_recompute`` layers so that it fits; None where all are too few."""
        most = self.n_layers - n_recompute

        def fits(mlp: int) -> bool:
            return self.memory.total_bytes(most - mlp, mlp) <= limit

        if fits(0):
            return 0
        if not fits(most):
            return None
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high


def candidates(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> list[Candidate]:
    """The ways to run that are worth a look, whether they fit into ``limit`` bytes or not, the best first.

    Raises:
        ConfigError: ``gradient_checkpointing`` names other layers than the model has.
    """
    found = []
    for rows, accumulation in splits(config, data):
        split = split_of(config, model, device, data, dtype, rows, accumulation)
        found += [split.candidate(*layers) for layers in _layers(config, model, split, limit)]
    return sorted(found, key=_rank)


def longest_row(config: FinetuneConfig, data: DataStats) -> int:
    """Tokens of the longest row, or of a pack."""
    return config.max_length if data.layout is BatchLayout.PACKED else data.max_tokens


def default_effective_batch(data: DataStats) -> int:
    """Sequences of a step when none were asked for: 16 rows, or the packs that hold about as many.

    So packing changes how rows are laid out, and not how often a run learns.
    """
    return max(1, round(DEFAULT_EFFECTIVE_BATCH_SIZE * data.n_sequences / max(1, data.n_rows)))


def split_of(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    data: DataStats,
    dtype: str,
    rows: int,
    accumulation: int,
) -> Split:
    """What a split costs."""
    row_tokens = longest_row(config, data)
    share = data.n_supervised_tokens / max(1, data.n_tokens)
    batch = MicroBatch(
        rows=rows,
        row_tokens=row_tokens,
        supervised_tokens=min(rows * row_tokens, math.ceil(rows * row_tokens * min(1.0, 1.5 * share))),
        ragged=data.percentiles[0] < data.max_tokens,
        layout=data.layout,
        n_documents=math.ceil(rows * data.n_rows / max(1, data.n_sequences)),
    )
    # A padded batch of several rows is as wide as its longest; the upper quartile stands for it.
    mean = data.n_tokens / max(1, data.n_sequences)
    typical = mean if batch.joined or rows == 1 else float(data.percentiles[3])
    attended, family = typical, fused_family(model, config)
    if batch.joined:  # a mask spans the whole batch; fused layers need none, and look at a document alone
        attended = rows * typical if family is None else data.mean_tokens
    tokens = batch.mean_tokens(typical, captured=not not_captured_because(family, model, device, dtype))
    load = Load(tokens=tokens, attended=attended, supervised_share=share, accumulation=accumulation)
    return Split(
        rows,
        accumulation,
        model.n_layers,
        memory_of(config, model, device, dtype, batch),
        pace_of(config, model, device, dtype, load, dense=batch.dense),
    )


def splits(config: FinetuneConfig, data: DataStats) -> Iterator[tuple[int, int]]:
    """Every device batch with its accumulation that makes the effective batch."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch and accumulation:
        yield batch, accumulation
        return
    effective = config.effective_batch_size or default_effective_batch(data)
    if config.effective_batch_size is None and (batch or accumulation):
        fixed = batch or accumulation or 1
        effective = fixed * max(1, round(effective / fixed))
    for size in range(1, effective + 1):
        steps, rest = divmod(effective, size)
        if not rest and size == (batch or size) and steps == (accumulation or steps):
            yield size, steps


def _layers(config: FinetuneConfig, model: ModelSpec, split: Split, limit: int) -> list[Layers]:
    asked, n, fused = config.gradient_checkpointing, model.n_layers, fused_family(model, config) is not None
    if isinstance(asked, Mapping):
        return [layers_asked(asked, model, fused=fused)]
    if asked == "auto":
        return split.worth_a_look(limit) if fused else [(keep, 0) for keep in range(n, -1, -1)]
    return [(n, 0)] if asked in ("none", False) else [(0, 0)]


def _rank(candidate: Candidate) -> tuple[float, float, int, int]:
    """Fastest first; without a measured rate the least recomputation, then the largest batch; then the leanest."""
    if candidate.step_seconds is None:
        return (0.0, candidate.twice, candidate.accumulation, candidate.budget.total_bytes)
    return (round(candidate.step_seconds, 4), candidate.twice, 0, candidate.budget.total_bytes)
