"""Why each number of a plan is this one, what the runner-up would cost, and how it will run."""

from __future__ import annotations

from collections.abc import Sequence

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Decision
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import GIB, format_bytes
from nbqlora.planner import probed, reasons
from nbqlora.planner.attention import choose_kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.fused import fused_family, not_captured_because
from nbqlora.planner.fused_memory import FusedMemory
from nbqlora.planner.limits import HOST_RESERVE_BYTES, Limits, usable_bytes
from nbqlora.planner.search import longest_row
from nbqlora.planner.shards import shards_of
from nbqlora.planner.standing import FRAGMENTATION_BYTES


def decisions(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    data: DataStats,
    dtype: str,
    ranked: Sequence[Candidate],
    best: Candidate,
    limits: Limits,
    n_processes: int,
) -> tuple[Decision, ...]:
    """One row for each thing that was decided.

    Args:
        n_processes: that share a machine's memory.
    """
    split = f"{reasons.rows(best.micro_batch_size, data)}, accumulation {best.accumulation}"
    why_layers = reasons.layers(config, best, limits)
    return (
        Decision(name="dtype", value=dtype, because=_why_dtype(config, device)),
        Decision(name="packing", value=_layout(config, data), because=data.layout_because),
        Decision(name="batch", value=split, because=reasons.batch(config, data, ranked, best, limits)),
        Decision(name="layers", value=reasons.in_words(best.mix), because=why_layers),
        *_tiles(config, best, limits),
        *_host(config, device, best, limits),
        *_how_it_runs(config, model, device, data, dtype, best),
        probed.intended(device),
        Decision(name="loss", value=f"{best.loss_chunk_tokens} tokens at once", because=reasons.chunk(best)),
        Decision(
            name="memory",
            value=f"{format_bytes(limits.device_bytes)} usable",
            because=_why_limit(config, device, n_processes),
        ),
    )


def _layout(config: FinetuneConfig, data: DataStats) -> str:
    if data.layout is BatchLayout.PACKED:
        filled = data.n_tokens / (data.n_sequences * config.max_length)
        return f"{data.n_rows} rows in {data.n_sequences} packs, {filled:.0%} full"
    return "off: rows end to end" if data.layout is BatchLayout.JOINED else "off: rows padded to the longest"


def _tiles(config: FinetuneConfig, best: Candidate, limits: Limits) -> list[Decision]:
    """MLPs in tiles, or why not where nothing else of a layer is kept."""
    if best.mix.tile_tokens:
        value = f"{best.mix.tile_tokens} tokens at once"
        return [Decision(name="MLP", value=value, because=reasons.tiles(best, limits))]
    if isinstance(best.memory, FusedMemory) and config.lora_dropout and not best.mix.keep:
        return [Decision(name="MLP", value="whole", because="lora_dropout draws by place, which tiles would change")]
    return []


def _host(config: FinetuneConfig, device: DeviceSpec, best: Candidate, limits: Limits) -> list[Decision]:
    """What of the host's memory is taken, and how much might be."""
    if not best.mix.offload:
        return []
    each = format_bytes(best.memory.input_bytes)
    what = f"{best.mix.offload} input{'s' if best.mix.offload > 1 else ''} of {each}"
    free = format_bytes(device.host_free_bytes)
    if device.kind == "cpu":
        most = "the process's own, counted in the peak"
    elif config.ram_gib is not None:
        most = f"ram_gib allows {format_bytes(limits.host_bytes)}"
    elif limits.host_bytes == device.host_free_bytes // 2:
        most = f"up to half of the {free} that are free"
    else:
        most = f"up to {format_bytes(limits.host_bytes)}: {free} are free, {format_bytes(HOST_RESERVE_BYTES)} stay so"
    return [Decision(name="host RAM", value=format_bytes(best.host_bytes), because=f"{what}; {most}")]


def _how_it_runs(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, best: Candidate
) -> list[Decision]:
    """Attention, of which nothing is known in transformers' own layers, and the step."""
    family = fused_family(model, config)
    batch = MicroBatch(
        rows=best.micro_batch_size, row_tokens=longest_row(config, data), supervised_tokens=1, layout=data.layout
    )
    eager = not_captured_because(family, model, device, dtype, row_tokens=batch.line_tokens, shards=shards_of(config))
    step = Decision(name="step", value="eager", because=eager)
    if not eager:
        step = Decision(name="step", value="captured as a CUDA graph", because="after the first of a shape")
    if family is None:
        return [step]
    what, _, why = choose_kernel(family, device, dtype, model.head_dim, dense=batch.dense)[1].partition(": ")
    groups = best.memory.layer.attended.groups if isinstance(best.memory, FusedMemory) else 1
    value = what if groups == 1 else f"{what}; backward in {groups} groups of heads"
    return [Decision(name="attention", value=value, because=why), step]


def _why_dtype(config: FinetuneConfig, device: DeviceSpec) -> str:
    if config.dtype != "auto":
        return "pinned by dtype"
    if device.kind == "cpu":
        return "a CPU computes half precision more slowly than fp32"
    return "this card has bf16" if device.has_bf16 else "this card has no bf16"


def _why_limit(config: FinetuneConfig, device: DeviceSpec, n_processes: int) -> str:
    if config.vram_gib is not None:
        cut = usable_bytes(config, device) < int(config.vram_gib * GIB)
        return f"all that is free; vram_gib = {config.vram_gib:g} is more" if cut else "pinned by vram_gib"
    if device.kind == "cpu":
        shared = f", shared by {n_processes} processes" if n_processes > 1 else ""
        return f"free RAM and what this process holds, less {format_bytes(FRAGMENTATION_BYTES)} in reserve{shared}"
    context = f"context {format_bytes(device.context_bytes)}, " if device.context_bytes else ""
    return f"{context}reserve {format_bytes(FRAGMENTATION_BYTES)} for fragmentation"
