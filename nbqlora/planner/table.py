"""The memory that usual models need, by the same arithmetic as a plan: the leanest plan, and the one worth having."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.memory_table import MemoryRow, MemoryTable
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import GIB, format_bytes
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.known import CARDS, CONTEXT_BYTES, PLENTY_BYTES, SHAPES, device_of, model_of
from nbqlora.planner.lean import leanest
from nbqlora.planner.limits import ROUNDING_BYTES, Limits
from nbqlora.planner.mix import all_kept
from nbqlora.planner.quickest import Split
from nbqlora.planner.reasons import in_words
from nbqlora.planner.search import split_of, splits
from nbqlora.planner.standing import FRAGMENTATION_BYTES, choose_dtype

# A recommended plan is at most so much slower than one with all the memory it could use.
WITHIN = 0.10
# Nominal sizes of usual cards, and the share of it that is visible at the worst (a T4's 14.74 of 16 GiB, with ECC).
CARDS_GB = (4, 6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180)
VISIBLE = 0.92
# Of an 80 GB card: 79.2 GiB are visible on an H100.
EIGHTY_BYTES = int(79.2 * GIB)
STEP_BYTES = GIB // 16
# Options that a table has an answer for each value of.
GONE_THROUGH = ("model", "data", "eval_data", "vram_gib", "ram_gib", "gradient_checkpointing")


def memory_table(config: FinetuneConfig, card: str, names: Sequence[str] = tuple(SHAPES)) -> MemoryTable:
    """A row for each of the shapes ``names``; ``config`` says everything but the model and the data.

    Args:
        card: of :data:`nbqlora.planner.known.CARDS`: whose kernels and speeds are taken.
    """
    device = device_of(card)
    dtype = choose_dtype(config.dtype, device)
    defaults = FinetuneConfig(model="table", data="table")
    settings = {k: v for k, v in config.as_dict().items() if v != getattr(defaults, k) and k != "max_length"}
    return MemoryTable(
        rows=tuple(_row(name, config, device, dtype) for name in names),
        max_length=config.max_length,
        card=card,
        dtype=dtype,
        within=WITHIN,
        settings={k: v for k, v in settings.items() if v is not None and v != {}},
    )


def check_table(card: str, options: Mapping[str, Any]) -> None:
    """Whether such a table can be made.

    Raises:
        ConfigError: an unknown card, or an option that the table goes through itself.
    """
    problems = []
    if card not in CARDS:
        problems.append(Problem(key="card", message=f"expected one of {', '.join(CARDS)}, got {card!r}"))
    for name in GONE_THROUGH:
        if name in options:
            problems.append(Problem(key=name, message="is what the table goes through", hint="leave it out"))
    if options.get("fsdp") is True and options.get("gpus") in (None, 1, "all"):
        message = "over how many cards weights are split has to be said"
        problems.append(
            Problem(key="fsdp", message=message, hint="write gpus = 2; the table is then that of each card")
        )
    if problems:
        raise ConfigError(problems, "the options of memory_table")


def full_rows(max_length: int) -> DataStats:
    """Rows of one length, all of them learned."""
    return DataStats.full(1024, max_length)


def _row(name: str, config: FinetuneConfig, device: DeviceSpec, dtype: str) -> MemoryRow:
    model, data = model_of(name), full_rows(config.max_length)
    found = [split_of(config, model, device, data, dtype, *sizes) for sizes in splits(config, data)]
    alone = _alone(config, model, device, dtype)
    least = alone.candidate(leanest(alone.memory, model.n_layers, Limits(0)))
    offloaded = alone.candidate(leanest(alone.memory, model.n_layers, Limits(0, PLENTY_BYTES)))
    fastest = min((s.candidate(all_kept(model.n_layers)) for s in found), key=_seconds)
    recommended = _recommended(found, least, fastest)
    of_80 = _best(found, Limits(EIGHTY_BYTES - CONTEXT_BYTES - FRAGMENTATION_BYTES))
    return MemoryRow(
        shape=name,
        like=SHAPES[name].like,
        minimum_bytes=_needed(least),
        offloaded_bytes=_needed(offloaded),
        host_bytes=offloaded.host_bytes,
        recommended_bytes=_needed(recommended),
        recommended_rows=recommended.micro_batch_size,
        all_kept_bytes=_needed(fastest),
        slower=_seconds(least) / _seconds(fastest) - 1,
        cards_gb=(card_of(least.budget.total_bytes), card_of(recommended.budget.total_bytes)),
        rule_of_thumb=SHAPES[name].rule_of_thumb,
        on_80_gb="does not fit" if of_80 is None else _in_words(of_80, fastest),
    )


def _needed(candidate: Candidate) -> int:
    """What has to be there for it: ``vram_gib`` in bytes."""
    return candidate.budget.total_bytes + ROUNDING_BYTES


def _alone(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, dtype: str) -> Split:
    """One row at a time, of as many a step as otherwise."""
    one = replace(config, per_device_train_batch_size=1, gradient_accumulation_steps=None)
    data = full_rows(config.max_length)
    return split_of(one, model, device, data, dtype, *next(splits(one, data)))


def _recommended(found: Sequence[Split], least: Candidate, fastest: Candidate) -> Candidate:
    """The leanest of the quickest plans that is fast enough, by halving: more memory is never slower."""
    low, high = least.budget.total_bytes, max(least.budget.total_bytes, fastest.budget.total_bytes)
    best = fastest
    while high - low > STEP_BYTES:
        middle = (low + high) // 2
        candidate = _best(found, Limits(middle))
        if candidate is not None and _seconds(candidate) <= (1 + WITHIN) * _seconds(fastest):
            best, high = candidate, middle
        else:
            low = middle
    return best


def _best(found: Sequence[Split], limits: Limits) -> Candidate | None:
    """The quickest plan within the limits."""
    mixes = [(split, split.quickest(limits)) for split in found]
    return min((split.candidate(mix) for split, mix in mixes if mix is not None), key=_seconds, default=None)


def card_of(n_bytes: int) -> int | None:
    """The smallest usual card, in GB, on which so much can be allocated; None where none is so large."""
    needed = n_bytes + CONTEXT_BYTES + FRAGMENTATION_BYTES
    return next((n for n in CARDS_GB if needed <= n * VISIBLE * GIB), None)


def _seconds(candidate: Candidate) -> float:
    assert candidate.step_seconds is not None
    return candidate.step_seconds


def _in_words(candidate: Candidate, fastest: Candidate) -> str:
    """``2 rows at once, 80 keep, 69.5 GiB, as fast as it gets``."""
    rows = f"{candidate.micro_batch_size} row{'s' if candidate.micro_batch_size > 1 else ''} at once"
    slower = round((_seconds(candidate) / _seconds(fastest) - 1) * 100)
    pace = f"{slower} % slower than with all memory" if slower else "as fast as with all memory"
    return f"{rows}, {in_words(candidate.mix)}: {format_bytes(candidate.budget.total_bytes)}, {pace}"
