"""Every way to run: the splits of a step into micro-batches, and how many layers keep everything."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nbqlora.core.config import DEFAULT_EFFECTIVE_BATCH_SIZE, FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import budget, seconds_per_step


def candidates(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str
) -> list[Candidate]:
    """Every way to run, whether it fits or not, the best first.

    Raises:
        ConfigError: ``gradient_checkpointing`` names another number of layers than the model has.
    """
    row_tokens = longest_row(config, data)
    ragged = data.percentiles[0] < data.max_tokens
    share = data.n_supervised_tokens / max(1, data.n_tokens)
    # A padded batch of several rows is as wide as its longest; the upper quartile stands for it.
    joined = data.layout is not BatchLayout.PADDED
    mean = data.n_tokens / max(1, data.n_sequences)
    found = []
    for rows, accumulation in _splits(config, data):
        typical = mean if joined or rows == 1 else float(data.percentiles[3])
        attended = rows * typical if joined else typical
        supervised = min(rows * row_tokens, math.ceil(rows * row_tokens * min(1.0, 1.5 * share)))
        for keep in _keep_choices(config, model.n_layers):
            needed = budget(
                config, model, device, dtype, rows, row_tokens, supervised, keep, ragged=ragged, layout=data.layout
            )
            found.append(
                Candidate(
                    micro_batch_size=rows,
                    accumulation=accumulation,
                    n_keep=keep,
                    n_layers=model.n_layers,
                    budget=needed,
                    step_seconds=seconds_per_step(model, device, rows * typical, attended, share, accumulation, keep),
                )
            )
    return sorted(found, key=_rank)


def longest_row(config: FinetuneConfig, data: DataStats) -> int:
    """Tokens of the longest row, or of a pack."""
    return config.max_length if data.layout is BatchLayout.PACKED else data.max_tokens


def default_effective_batch(data: DataStats) -> int:
    """Sequences of a step when none were asked for: 16 rows, or the packs that hold about as many.

    So packing changes how rows are laid out, and not how often a run learns.
    """
    return max(1, round(DEFAULT_EFFECTIVE_BATCH_SIZE * data.n_sequences / max(1, data.n_rows)))


def _splits(config: FinetuneConfig, data: DataStats) -> Iterator[tuple[int, int]]:
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


def _keep_choices(config: FinetuneConfig, n_layers: int) -> list[int]:
    asked = config.gradient_checkpointing
    if isinstance(asked, Mapping):
        return [_layers_kept(asked, n_layers)]
    if asked == "auto":
        return list(range(n_layers, -1, -1))
    return [n_layers] if asked in ("none", False) else [0]


def _layers_kept(asked: Mapping[str, int], n_layers: int) -> int:
    """Layers that a table keeps; either of its numbers may be left out."""
    keep = asked.get("keep", n_layers - asked.get("recompute", 0))
    total = keep + asked.get("recompute", n_layers - keep)
    if 0 <= keep <= n_layers == total:
        return keep
    written = " + ".join(f"{n} {name}" for name, n in asked.items())
    several = len(asked) > 1
    message = (f"{written} = {sum(asked.values())}" if several else written) + f", but this model has {n_layers} layers"
    hint = "one of the two numbers is enough" if several else f"at most {n_layers}"
    raise ConfigError([Problem(key="gradient_checkpointing", message=message, hint=hint)])


def _rank(candidate: Candidate) -> tuple[float, int, int, int]:
    """Fastest first; without a measured rate the least recomputation, then the largest batch; then the leanest."""
    recomputed = candidate.n_layers - candidate.n_keep
    if candidate.step_seconds is None:
        return (0.0, recomputed, candidate.accumulation, candidate.budget.total_bytes)
    return (round(candidate.step_seconds, 4), recomputed, 0, candidate.budget.total_bytes)
