"""The ways to run that are worth a look: the splits of a step into micro-batches, each with its quickest mix of layers.

What a mix of layers costs, and what it takes, is in ``quickest``; here a step is split, and the splits are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nbqlora.core.config import DEFAULT_EFFECTIVE_BATCH_SIZE, FinetuneConfig
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.planner.asked import layers_asked
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import memory_of, pace_of
from nbqlora.planner.fused import captures, fused_family
from nbqlora.planner.limits import Limits
from nbqlora.planner.mix import Mix, all_kept
from nbqlora.planner.pace import Load
from nbqlora.planner.quickest import Split
from nbqlora.planner.shards import n_cards


def candidates(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limits: Limits
) -> list[Candidate]:
    """The ways to run that are worth a look, whether they fit into the limits or not, the best first.

    Raises:
        ConfigError: ``gradient_checkpointing`` names other layers than the model has.
    """
    found = []
    for rows, accumulation in splits(config, data):
        split = split_of(config, model, device, data, dtype, rows, accumulation)
        found += [split.candidate(mix) for mix in _mixes(config, model, split, limits)]
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
        longest_document=data.max_tokens,
    )
    # A padded batch of several rows is as wide as its longest; the upper quartile stands for it.
    mean = data.n_tokens / max(1, data.n_sequences)
    typical = mean if batch.joined or rows == 1 else float(data.percentiles[3])
    attended, family = typical, fused_family(model, config)
    if batch.joined:  # a mask spans the whole batch; fused layers need none, and look at a document alone
        attended = rows * typical if family is None else data.mean_tokens
    tokens = batch.mean_tokens(typical, captured=captures(family, model, config, device, dtype, batch))
    load = Load(tokens=tokens, attended=attended, supervised_share=share, accumulation=accumulation)
    return Split(
        rows=rows,
        accumulation=accumulation,
        n_layers=model.n_layers,
        memory=memory_of(config, model, device, dtype, batch),
        pace=pace_of(config, model, device, dtype, load, dense=batch.dense),
    )


def step_rows(config: FinetuneConfig, data: DataStats) -> int:
    """Rows, or packs, of a step; the same however many cards share them, unless each card's were asked for."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch and accumulation:
        return config.effective_batch_size or batch * accumulation * n_cards(config)
    effective = config.effective_batch_size or default_effective_batch(data)
    if config.effective_batch_size is None and (batch or accumulation):
        fixed = batch or accumulation or 1
        effective = fixed * max(1, round(effective / fixed))
    return effective


def splits(config: FinetuneConfig, data: DataStats) -> Iterator[tuple[int, int]]:
    """Every device batch with its accumulation that makes a card's share of the effective batch."""
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch and accumulation:
        yield batch, accumulation
        return
    share = -(-step_rows(config, data) // n_cards(config))
    pinned = batch or accumulation
    if pinned and share % pinned:  # a share that is rounded up to what was asked for
        share = -(-share // pinned) * pinned
    for size in range(1, share + 1):
        steps, rest = divmod(share, size)
        if not rest and size == (batch or size) and steps == (accumulation or steps):
            yield size, steps


def _mixes(config: FinetuneConfig, model: ModelSpec, split: Split, limits: Limits) -> list[Mix]:
    """Those worth a look; layers that were asked for are kept, and have their MLP whole and in tiles."""
    asked, n = config.gradient_checkpointing, model.n_layers
    if asked == "auto":
        return split.worth_a_look(limits)
    if asked in ("none", False):
        return [all_kept(n)]
    if isinstance(asked, Mapping):
        mix = layers_asked(asked, model, fused=fused_family(model, config) is not None)
    else:
        mix = Mix(offload=n) if asked == "offload" else Mix(recompute=n)
    return [mix, *(mix.with_tiles(tokens) for tokens in split.memory.tiles if mix.keep < n)]


def _rank(candidate: Candidate) -> tuple[float, float, int, int]:
    """Fastest first; without a measured rate the least recomputation, then the largest batch; then the leanest."""
    if candidate.step_seconds is None:
        return (0.0, candidate.twice, candidate.accumulation, candidate.budget.total_bytes)
    return (round(candidate.step_seconds, 4), candidate.twice, 0, candidate.budget.total_bytes)
