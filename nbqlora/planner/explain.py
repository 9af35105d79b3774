"""Why each number of a plan is this one, what the runner-up would cost, and what is not known."""

from __future__ import annotations

from collections.abc import Sequence

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Decision
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import GIB, format_bytes
from nbqlora.planner.attention import choose_kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.fused import fused_family, not_captured_because
from nbqlora.planner.standing import FRAGMENTATION_BYTES


def decisions(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    data: DataStats,
    dtype: str,
    ranked: Sequence[Candidate],
    best: Candidate,
    limit: int,
) -> tuple[Decision, ...]:
    """One row for each thing that was decided."""
    return (
        Decision(name="dtype", value=dtype, because=_why_dtype(config, device)),
        Decision(name="packing", value=_layout(config, data), because=data.layout_because),
        Decision(
            name="batch",
            value=f"{_rows(best.micro_batch_size, data)}, accumulation {best.accumulation}",
            because=_why_batch(config, data, ranked, best, limit),
        ),
        Decision(name="layers", value=_layers(best), because=_why_layers(config, ranked, best, limit)),
        *_how_it_runs(config, model, device, data, dtype, best),
        Decision(name="memory", value=f"{format_bytes(limit)} usable", because=_why_limit(config, device, limit)),
    )


def _layout(config: FinetuneConfig, data: DataStats) -> str:
    if data.layout is BatchLayout.PACKED:
        filled = data.n_tokens / (data.n_sequences * config.max_length)
        return f"{data.n_rows} rows in {data.n_sequences} packs, {filled:.0%} full"
    return "off: rows end to end" if data.layout is BatchLayout.JOINED else "off: rows padded to the longest"


def _rows(count: int, data: DataStats) -> str:
    word = "pack" if data.layout is BatchLayout.PACKED else "row"
    return f"{count} {word}{'s' if count != 1 else ''} at once"


def _layers(candidate: Candidate) -> str:
    counts = (
        (candidate.n_keep, "keep"),
        (candidate.n_recompute_mlp, "recompute MLP"),
        (candidate.n_recompute, "recompute"),
    )
    return " · ".join(f"{n} {what}" for n, what in counts if n)


def _how_it_runs(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, best: Candidate
) -> list[Decision]:
    """Attention, of which nothing is known in transformers' own layers, and the step."""
    family = fused_family(model, config)
    eager = not_captured_because(family, model, device, dtype)
    step = Decision(name="step", value="eager", because=eager)
    if not eager:
        step = Decision(name="step", value="captured as a CUDA graph", because="after the first of a shape")
    if family is None:
        return [step]
    batch = MicroBatch(rows=best.micro_batch_size, row_tokens=1, supervised_tokens=1, layout=data.layout)
    what, _, why = choose_kernel(family, device, dtype, model.head_dim, dense=batch.dense)[1].partition(": ")
    return [Decision(name="attention", value=what, because=why), step]


def _why_dtype(config: FinetuneConfig, device: DeviceSpec) -> str:
    if config.dtype != "auto":
        return "pinned by dtype"
    if device.kind == "cpu":
        return "a CPU computes half precision more slowly than fp32"
    return "this card has bf16" if device.has_bf16 else "this card has no bf16"


def _why_batch(
    config: FinetuneConfig, data: DataStats, ranked: Sequence[Candidate], best: Candidate, limit: int
) -> str:
    if config.per_device_train_batch_size or config.gradient_accumulation_steps:
        return "pinned"
    larger = [x for x in ranked if x.micro_batch_size > best.micro_batch_size]
    if not larger:
        return f"all {best.micro_batch_size} of a step at once, the fewest passes"
    nearest = min(larger, key=lambda x: (x.micro_batch_size, x.budget.total_bytes))
    rows = _rows(nearest.micro_batch_size, data)
    if nearest.budget.total_bytes > limit:
        recomputed = " even with all layers recomputed" if nearest.n_recompute == nearest.n_layers else ""
        return f"{rows} would need {format_bytes(nearest.budget.total_bytes)}{recomputed}"
    fitting = [x for x in larger if x.micro_batch_size == nearest.micro_batch_size and x.budget.total_bytes <= limit]
    quickest = min(fitting, key=lambda x: (x.step_seconds or 0.0, x.twice))
    return f"{rows} would {_slower(quickest, best)}"


def _slower(other: Candidate, best: Candidate) -> str:
    extra = best.n_keep - other.n_keep
    words = [f"recompute {extra} more layers"] if extra > 0 else []
    if other.step_seconds and best.step_seconds:
        percent = (other.step_seconds / best.step_seconds - 1) * 100
        words += [f"{'' if words else 'be '}{percent:.0f} % slower"] if percent >= 0.5 else []
    return ": ".join(words) or "not be faster"


def _why_layers(config: FinetuneConfig, ranked: Sequence[Candidate], best: Candidate, limit: int) -> str:
    if config.gradient_checkpointing != "auto":
        return "pinned by gradient_checkpointing"
    if best.n_keep == best.n_layers:
        return "everything fits, so nothing is computed twice"
    more = [
        x.budget.total_bytes
        for x in ranked
        if x.micro_batch_size == best.micro_batch_size and x.n_keep == best.n_keep + 1
    ]
    over = format_bytes(min(more) - limit) if more else "no room"
    return f"one more layer kept would be {over} over"


def _why_limit(config: FinetuneConfig, device: DeviceSpec, limit: int) -> str:
    if config.vram_gib is not None:
        cut = limit < int(config.vram_gib * GIB)
        return f"all that is free; vram_gib = {config.vram_gib:g} is more" if cut else "pinned by vram_gib"
    if device.kind == "cpu":
        return f"free RAM and what this process holds, less {format_bytes(FRAGMENTATION_BYTES)} in reserve"
    context = f"context {format_bytes(device.context_bytes)}, " if device.context_bytes else ""
    return f"{context}reserve {format_bytes(FRAGMENTATION_BYTES)} for fragmentation"


# Fewer optimizer steps than this rarely teach anything.
FEW_STEPS = 4


def notes(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, steps: int
) -> list[str]:
    """What a person should know before it starts."""
    found = list(device.notes)
    if steps < FEW_STEPS and config.max_steps < 0:
        kind = "pack" if data.layout is BatchLayout.PACKED else "row"
        what = f"{_counted(steps, 'optimizer step')} for {_counted(data.n_sequences, kind)}"
        found.append(f"only {what}; a smaller effective_batch_size learns more often")
    if data.n_truncated:
        found.append(f"{data.n_truncated} of {data.n_rows} rows are cut at max_length = {config.max_length}")
    found += [f"{n} rows left out: {reason}" for reason, n in data.n_skipped.items()]
    if model.max_positions and config.max_length > model.max_positions:
        found.append(f"max_length {config.max_length} is beyond the model's {model.max_positions} positions")
    if dtype == "bf16" and device.kind == "cpu":
        found.append("bf16 on a CPU without matrix units can be 20 times slower than fp32")
    if dtype == "bf16" and device.kind == "cuda" and not device.has_bf16:
        found.append('this card emulates bf16, slowly; dtype = "fp16" is native')
    if not device.rooms and model.download_bytes and model.download_bytes > device.disk_free_bytes:
        found.append(
            f"the download is {format_bytes(model.download_bytes)}, "
            f"the disk has {format_bytes(device.disk_free_bytes)} free"
        )
    return found


def _counted(n: int, what: str) -> str:
    return f"{n} {what}{'s' if n != 1 else ''}"


def unknowns(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec) -> tuple[str, ...]:
    """What the plan does not know, said rather than guessed."""
    found = []
    if device.kind == "cpu":
        found.append("what the C library keeps of freed memory: the process can hold more than the peak says")
    if device.kind == "cuda" and fused_family(model, config) is None:
        found.append("which attention kernel runs: counted as one that keeps expanded keys and values")
    if len(set(model.linear_shapes)) == 0:
        found.append("this model's layers: their linears were not found")
    return tuple(found)
