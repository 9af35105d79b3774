"""What to say when nothing fits: what was needed, what there is, and the smallest change that fits."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import DataStats, DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB, format_bytes
from nbqlora.planner.batch import CAPTURED_TOKENS, MicroBatch
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.embedding import limits_for
from nbqlora.planner.estimate import memory_of
from nbqlora.planner.lean import leanest
from nbqlora.planner.limits import Limits, usable_bytes
from nbqlora.planner.mix import Mix
from nbqlora.planner.reasons import in_words
from nbqlora.planner.search import candidates, longest_row
from nbqlora.planner.shards import shards_of
from nbqlora.planner.split import not_split_because, ways

LENGTH_STEP = 64


def does_not_fit(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limits: Limits
) -> str:
    """The error's text."""
    least, limit = least_of(config, model, device, data, dtype), limits.device_bytes
    change = "  " + _smallest_change(config, model, device, data, dtype, limit)
    if least.budget.total_bytes <= limit:
        n, needed = least.mix.offload, format_bytes(least.host_bytes)
        inputs = f"the inputs of {n} layers need {needed} of host memory, and {format_bytes(limits.host_bytes)} may be"
        return f"{inputs} taken (ram_gib)\n{change}"
    parts = least.budget.by_category
    largest = sorted(parts.items(), key=lambda item: -item[1])[:3]
    lines = [
        f"{model.name} needs {format_bytes(least.budget.total_bytes)}{_split(config, model)} and {device.name} has "
        f"{format_bytes(limit)} usable",
        "  most of it: " + ", ".join(f"{c.label} {format_bytes(n)}" for c, n in largest),
        change,
    ]
    if config.vram_gib is not None and usable_bytes(config, device) == int(config.vram_gib * GIB):
        lines.append(f"  vram_gib = {config.vram_gib:g} is your own limit")
    return "\n".join(lines)


def _split(config: FinetuneConfig, model: ModelSpec) -> str:
    n = shards_of(ways(config, model)[-1])
    return f", split over {n} cards," if n > 1 else ""


def least_of(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str) -> Candidate:
    """What takes the least of the card; of what is pinned, whatever it takes of the host."""
    nothing = replace(limits_for(config, model, device, dtype), device_bytes=0)
    found = [x for way in ways(config, model) for x in candidates(way, model, device, data, dtype, nothing)]
    return min(found, key=lambda x: x.budget.total_bytes)


def _smallest_change(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> str:
    free = config
    for words, free in _unpinned(config, model):
        least = least_of(free, model, device, data, dtype)
        if replace(limits_for(free, model, device, dtype), device_bytes=limit).fit(least):
            return f"it fits when you {words}"
    free = replace(free, ram_gib=config.ram_gib)
    tokens, mix = longest_that_fits(free, model, device, data, dtype, limit)
    if tokens:
        one = ", one row at a time" if config.per_device_train_batch_size or config.gradient_accumulation_steps else ""
        return f"it fits with max_length = {tokens}{one} ({in_words(mix)})"
    leanest_parts = least_of(free, model, device, data, dtype).budget.by_category
    m = MemoryCategory
    fixed = sum(n for category, n in leanest_parts.items() if category not in (m.ACTIVATIONS, m.LOSS))
    return f"no max_length fits: {format_bytes(fixed)} are needed before the first token; a smaller model does"


def _unpinned(config: FinetuneConfig, model: ModelSpec) -> Iterator[tuple[str, FinetuneConfig]]:
    """Less and less pinned: what to write, and the config that it makes. Each change alone, then several."""
    changes = list(_changes(config, model))
    for words, change in changes:
        yield words, replace(config, **change)
    for n in range(2, len(changes) + 1):
        together: dict[str, Any] = {}
        for _, change in changes[:n]:
            together |= change
        yield " and ".join(words for words, _ in changes[:n]), replace(config, **together)


def _changes(config: FinetuneConfig, model: ModelSpec) -> Iterator[tuple[str, dict[str, Any]]]:
    """What may be written differently, the smallest change first."""
    if config.gradient_checkpointing != "auto":
        yield 'write gradient_checkpointing = "auto"', {"gradient_checkpointing": "auto"}
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch or accumulation:
        rows = batch * accumulation if batch and accumulation else config.effective_batch_size
        free = {"per_device_train_batch_size": None, "gradient_accumulation_steps": None, "effective_batch_size": rows}
        yield _less_pinned(rows, bool(batch), bool(accumulation)), free
    if config.ram_gib is not None:
        yield "leave out ram_gib", {"ram_gib": None}
    if config.fsdp is False and not not_split_because(config, model):
        yield "leave out fsdp", {"fsdp": "auto"}
    if not (config.load_in_4bit or model.quantized):
        yield "write load_in_4bit = true", {"load_in_4bit": True}


def _less_pinned(rows: int | None, batch: bool, accumulation: bool) -> str:
    if batch and accumulation:
        return f"write effective_batch_size = {rows} for per_device_train_batch_size and gradient_accumulation_steps"
    return f"leave out {'per_device_train_batch_size' if batch else 'gradient_accumulation_steps'}"


def longest_that_fits(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limit: int
) -> tuple[int, Mix]:
    """The longest row, in steps of 64 tokens, that one row a micro-batch could have, and its layers; 0 for none.

    Args:
        limit: bytes of the device that a run may take.
    """
    config, row = ways(config, model)[-1], longest_row(config, data)
    spans = [(model, range(LENGTH_STEP, row, LENGTH_STEP))]
    if model.embedding_on_host:  # it is on the card for shorter rows, and may be for longer ones
        on_card = replace(model, embedding_on_host=False)
        spans = [(on_card, spans[0][1]), (model, range(CAPTURED_TOKENS + LENGTH_STEP, row, LENGTH_STEP))]

    def least(n: int, model: ModelSpec) -> tuple[int, Mix]:
        limits = limits_for(config, model, device, dtype)
        # Of a full pack; a row is one whatever is said here.
        documents = math.ceil(n * data.n_rows / max(1, data.n_tokens))
        batch = MicroBatch(
            rows=1,
            row_tokens=n,
            supervised_tokens=n,
            layout=data.layout,
            n_documents=documents,
            longest_document=data.max_tokens,
        )
        memory = memory_of(config, model, device, dtype, batch)
        mix = leanest(memory, model.n_layers, limits)
        return memory.total_bytes(mix), mix

    longest = 0, Mix()
    for way, lengths in spans:
        found = bisect_right(lengths, limit, key=lambda n: least(n, way)[0])
        if found and lengths[found - 1] > longest[0]:
            longest = lengths[found - 1], least(lengths[found - 1], way)[1]
    return longest
