"""What to say when nothing fits: what was needed, what there is, and the smallest change that fits."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import DataStats, DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB, format_bytes
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import budget
from nbqlora.planner.search import candidates, longest_row

LENGTH_STEP = 64


def does_not_fit(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> str:
    """The error's text."""
    least = _leanest(config, model, device, data, dtype)
    parts = least.budget.by_category
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    lines = [
        f"{model.name} needs {format_bytes(least.budget.total_bytes)} and {device.name} has "
        f"{format_bytes(limit)} usable",
        "  most of it: " + ", ".join(f"{c.label} {format_bytes(n)}" for c, n in largest),
        "  " + _smallest_change(config, model, device, data, dtype, limit),
    ]
    if config.vram_gib is not None and limit == int(config.vram_gib * GIB):
        lines.append(f"  vram_gib = {config.vram_gib:g} is your own limit")
    return "\n".join(lines)


def _leanest(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str) -> Candidate:
    return min(candidates(config, model, device, data, dtype, limit=0), key=lambda x: x.budget.total_bytes)


def _smallest_change(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> str:
    free = config
    for words, free in _unpinned(config, model):
        if _leanest(free, model, device, data, dtype).budget.total_bytes <= limit:
            return f"it fits when you {words}"
    tokens = _longest_that_fits(free, model, device, data, dtype, limit)
    if tokens:
        one = ", one row at a time," if config.per_device_train_batch_size or config.gradient_accumulation_steps else ""
        return f"it fits with max_length = {tokens}{one} and all layers recomputed"
    least = _leanest(free, model, device, data, dtype).budget.by_category
    m = MemoryCategory
    fixed = sum(n for category, n in least.items() if category not in (m.ACTIVATIONS, m.LOSS))
    return f"no max_length fits: {format_bytes(fixed)} are needed before the first token; a smaller model does"


def _unpinned(config: FinetuneConfig, model: ModelSpec) -> Iterator[tuple[str, FinetuneConfig]]:
    """Less and less pinned: what to write, and the config that it makes."""
    words = []
    if config.gradient_checkpointing not in ("auto", "full", True):
        config = replace(config, gradient_checkpointing="auto")
        words.append('write gradient_checkpointing = "auto"')
        yield " and ".join(words), config
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch or accumulation:
        rows = batch * accumulation if batch and accumulation else config.effective_batch_size
        config = replace(
            config, per_device_train_batch_size=None, gradient_accumulation_steps=None, effective_batch_size=rows
        )
        words.append(_less_pinned(rows, bool(batch), bool(accumulation)))
        yield " and ".join(words), config
    if not (config.load_in_4bit or model.quantized):
        words.append("write load_in_4bit = true")
        yield " and ".join(words), replace(config, load_in_4bit=True)


def _less_pinned(rows: int | None, batch: bool, accumulation: bool) -> str:
    if batch and accumulation:
        return f"write effective_batch_size = {rows} for per_device_train_batch_size and gradient_accumulation_steps"
    return f"leave out {'per_device_train_batch_size' if batch else 'gradient_accumulation_steps'}"


def _longest_that_fits(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> int:
    """The longest row, in steps of 64 tokens, that one row a micro-batch could have; 0 when none fits."""

    def needed(n: int) -> int:
        batch = MicroBatch(rows=1, row_tokens=n, supervised_tokens=n, layout=data.layout)
        return budget(config, model, device, dtype, batch, 0).total_bytes

    lengths = range(LENGTH_STEP, longest_row(config, data), LENGTH_STEP)
    found = bisect_right(lengths, limit, key=needed)
    return lengths[found - 1] if found else 0
