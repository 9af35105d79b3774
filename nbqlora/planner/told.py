"""What a person should know before a run starts, and what the plan does not know."""

from __future__ import annotations

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import format_bytes
from nbqlora.planner.fused import fused_family
from nbqlora.planner.mix import Mix
from nbqlora.planner.pace import copy_rate

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


def unknowns(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, mix: Mix) -> tuple[str, ...]:
    """What the plan does not know, said rather than guessed."""
    found = []
    if device.matmul_flops is None:
        found.append("how fast this device is: ways to run were compared by what they compute twice, not by seconds")
    if mix.offload and device.kind == "cuda":
        rate = copy_rate(device) / 1e9
        found.append(
            f"how fast inputs go to the host and back: {rate:.0f} GB/s are counted, and RAM that can be pinned"
        )
    if device.kind == "cpu":
        found.append("what the C library keeps of freed memory: the process can hold more than the peak says")
    if device.kind == "cuda" and fused_family(model, config) is None:
        found.append("which attention kernel runs: counted as one that keeps expanded keys and values")
    if len(set(model.linear_shapes)) == 0:
        found.append("this model's layers: their linears were not found")
    return tuple(found)
