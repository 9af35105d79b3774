"""Config, model, machine and data -> a plan: which batch, what each layer keeps, and why.

The peak is the larger of two moments: the loss (all kept tensors and one chunk of logits) and the backward
of a layer (all kept tensors, that layer's own if it is recomputed, its gradients and one dequantized
weight). Among the splits of ``effective_batch_size`` and the numbers of layers kept, the fastest that fits
wins. Pure arithmetic: any machine can be planned for on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from nbqlora.core.config import DEFAULT_EFFECTIVE_BATCH_SIZE, FinetuneConfig
from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import GIB
from nbqlora.planner import explain
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import (
    DTYPE_BYTES,
    FRAGMENTATION_BYTES,
    adapter_params,
    budget,
    choose_dtype,
    loss_chunk_tokens,
    seconds_per_step,
)


def usable_bytes(config: FinetuneConfig, device: DeviceSpec) -> int:
    """What the run may allocate: ``vram_gib``, or all that is free less a reserve for fragmentation.

    On a CPU the process itself counts, so what it already holds is added to what is free.
    """
    if config.vram_gib is not None:
        return int(config.vram_gib * GIB)
    held = device.context_bytes if device.kind == "cpu" else 0
    return max(0, device.free_bytes + held - FRAGMENTATION_BYTES)


def _splits(config: FinetuneConfig) -> Iterator[tuple[int, int]]:
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch and accumulation:
        yield batch, accumulation
        return
    effective = config.effective_batch_size or DEFAULT_EFFECTIVE_BATCH_SIZE
    if config.effective_batch_size is None and (batch or accumulation):
        fixed = batch or accumulation or 1
        effective = fixed * max(1, round(effective / fixed))
    for size in range(1, effective + 1):
        if (
            effective % size == 0
            and size == (batch or size)
            and effective // size == (accumulation or effective // size)
        ):
            yield size, effective // size


def _keep_choices(config: FinetuneConfig, n_layers: int) -> list[int]:
    asked = config.gradient_checkpointing
    if asked == "auto":
        return list(range(n_layers, -1, -1))
    if isinstance(asked, Mapping):
        return [max(0, n_layers - asked.get("recompute", n_layers - asked.get("keep", 0)))]
    return [n_layers] if asked in ("none", False) else [0]


def candidates(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str
) -> list[Candidate]:
    """Every way to run, whether it fits or not."""
    row_tokens = config.max_length if config.packing else data.max_tokens
    share = data.n_supervised_tokens / max(1, data.n_tokens)
    # A batch of several rows is as wide as its longest; the upper quartile stands for it.
    mean = data.n_tokens / max(1, data.n_sequences)
    found = []
    for rows, accumulation in _splits(config):
        typical = mean if config.packing or rows == 1 else float(data.percentiles[3])
        supervised = min(rows * row_tokens, math.ceil(rows * row_tokens * min(1.0, 1.5 * share)))
        for keep in _keep_choices(config, model.n_layers):
            found.append(
                Candidate(
                    micro_batch_size=rows,
                    accumulation=accumulation,
                    n_keep=keep,
                    n_layers=model.n_layers,
                    budget=budget(config, model, device, dtype, rows, row_tokens, supervised, keep),
                    step_seconds=seconds_per_step(model, device, typical, share, rows, accumulation, keep),
                )
            )
    return found


def _rank(candidate: Candidate) -> tuple[float, int, int]:
    """Fastest first; without a measured rate the least recomputation, then the largest batch; then the leanest."""
    recomputed = candidate.n_layers - candidate.n_keep
    seconds = candidate.step_seconds
    if seconds is None:
        seconds = candidate.accumulation * (1 + recomputed / candidate.n_layers / 2)
    return (round(seconds, 4), recomputed, candidate.budget.total_bytes)


def make_plan(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    data: DataStats,
    *,
    output_dir: str,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Decide everything; nothing is loaded or allocated.

    Args:
        output_dir: where the run writes.
        notes: what the caller knows and the plan should say.

    Raises:
        DoesNotFitError: nothing fits, with the smallest change that would.
    """
    dtype = choose_dtype(config.dtype, device)
    limit = usable_bytes(config, device)
    ranked = sorted(candidates(config, model, device, data, dtype), key=_rank)
    fitting = [x for x in ranked if x.budget.total_bytes <= limit]
    if not fitting:
        least = min(ranked, key=lambda x: x.budget.total_bytes)
        raise DoesNotFitError(
            explain.does_not_fit(
                least,
                limit,
                config,
                model,
                device,
                shorter=_longest_that_fits(config, model, device, data, dtype, limit),
            )
        )
    best = fitting[0]
    c = DTYPE_BYTES[dtype]
    per_epoch = math.ceil(math.ceil(data.n_sequences / best.micro_batch_size) / best.accumulation)
    steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch)
    return Plan(
        model=model,
        device=device,
        data=data,
        dtype=dtype,
        load_in_4bit=config.load_in_4bit or model.quantized,
        micro_batch_size=best.micro_batch_size,
        gradient_accumulation_steps=best.accumulation,
        max_length=config.max_length,
        layer_policies=best.policies,
        loss_chunk_tokens=loss_chunk_tokens(model, c),
        total_steps=steps,
        step_seconds=best.step_seconds,
        usable_bytes=limit,
        budget=best.budget,
        output_dir=output_dir,
        disk_bytes=adapter_params(model, config) * 4,
        decisions=explain.decisions(config, device, dtype, ranked, best, limit),
        notes=(*notes, *explain.notes(config, model, device, data, dtype)),
        unknowns=explain.unknowns(model, device),
    )


def _longest_that_fits(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> int:
    """The longest row, in steps of 64 tokens, that one row a micro-batch could have; 0 when none fits."""
    longest = config.max_length if config.packing else data.max_tokens
    for tokens in range(longest // 64 * 64, 0, -64):
        least = budget(config, model, device, dtype, 1, tokens, tokens, 0)
        if least.total_bytes <= limit:
            return tokens
    return 0
