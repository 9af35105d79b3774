"""The table of usual models: what it calls minimum and recommended, against plans for just so much memory."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

import nbqlora
from nbqlora.core.errors import ConfigError, DoesNotFitError
from nbqlora.core.memory_table import MemoryRow, MemoryTable
from nbqlora.core.plan import Plan
from nbqlora.planner import make_plan
from nbqlora.planner.known import CARDS, SHAPES, device_of, model_of
from nbqlora.planner.limits import ROUNDING_BYTES
from nbqlora.planner.table import card_of, full_rows, memory_table
from tests.planner.shapes import GIB, MODELS, options

LENGTH = 2048


@pytest.fixture(scope="module")
def table() -> MemoryTable:
    return memory_table(options(max_length=LENGTH), "A100")


def planned(shape: str, n_bytes: int, *, host_bytes: int = 0, **changes: Any) -> Plan:
    """A plan for exactly so much of the card."""
    device = replace(device_of("A100"), free_bytes=n_bytes, host_free_bytes=host_bytes)
    config = options(max_length=LENGTH, vram_gib=1e6, ram_gib=1e6, **changes)
    return make_plan(config, model_of(shape), device, full_rows(LENGTH), output_dir="out")


def row_of(table: MemoryTable, shape: str) -> MemoryRow:
    return next(r for r in table.rows if r.shape == shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_minimum_is_the_least_with_a_plan(table: MemoryTable, shape: str) -> None:
    row, alone = row_of(table, shape), {"per_device_train_batch_size": 1}
    found = planned(shape, row.minimum_bytes, **alone)
    assert found.host_bytes == 0 and found.predicted_peak_bytes <= row.minimum_bytes
    with pytest.raises(DoesNotFitError):
        planned(shape, int(row.minimum_bytes * 0.995), **alone)
    lean = planned(shape, row.offloaded_bytes, host_bytes=row.host_bytes, **alone)
    assert lean.host_bytes <= row.host_bytes and row.offloaded_bytes < row.minimum_bytes
    with pytest.raises(DoesNotFitError):
        planned(shape, row.offloaded_bytes - 1, host_bytes=row.host_bytes, **alone)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_recommended_is_fast_enough_and_not_much_more_than_needed(table: MemoryTable, shape: str) -> None:
    row = row_of(table, shape)
    fastest, found = planned(shape, 1 << 50), planned(shape, row.recommended_bytes)
    assert fastest.predicted_peak_bytes + ROUNDING_BYTES == row.all_kept_bytes
    assert found.step_seconds and fastest.step_seconds and found.step_seconds <= 1.1 * fastest.step_seconds
    assert found.micro_batch_size == row.recommended_rows
    less = planned(shape, row.recommended_bytes - GIB // 8)
    assert less.step_seconds and less.step_seconds > 1.1 * fastest.step_seconds
    assert row.minimum_bytes < row.recommended_bytes < row.all_kept_bytes and row.slower > 0.1


def test_beside_the_rule_of_thumb(table: MemoryTable) -> None:
    assert [r.shape for r in table.rows] == ["1B", "3B", "7B", "8B", "13B", "70B"]
    assert [r.rule_of_thumb for r in table.rows] == [
        *["8 / 16 GB, batch 4-8"] * 2, *["16 / 24 GB, batch 2-4"] * 2, "24 / 40 GB, batch 1-2",
        "80+ / 2 x 80 GB, batch 1",
    ]  # fmt: skip
    eight, seventy = row_of(table, "8B"), row_of(table, "70B")
    assert 6 * GIB < eight.minimum_bytes < 7.5 * GIB and eight.cards_gb[0] == 8
    assert 38 * GIB < seventy.minimum_bytes < 44 * GIB and seventy.cards_gb[0] == 48
    assert seventy.on_80_gb.startswith("1 row at once, 80 keep: ")  # one card does what two are asked for


def test_what_one_card_of_80_gb_does_is_a_plan_for_it(table: MemoryTable) -> None:
    usable = int(79.2 * GIB) - int(0.4 * GIB) - GIB // 2
    found = planned("70B", usable)
    peak = f"{found.predicted_peak_bytes / GIB:.1f} GiB"
    assert f": {peak}, " in row_of(table, "70B").on_80_gb
    long = memory_table(options(max_length=131072), "A100", ["70B", "1B"])
    assert long.rows[0].on_80_gb == "does not fit" or "join" in long.rows[0].on_80_gb


def test_usual_cards() -> None:
    found = [card_of(int(n * GIB)) for n in (1, 2.8, 6.4, 6.5, 13.8, 20, 72, 120, 200)]
    assert found == [4, 6, 8, 10, 16, 24, 80, 141, None]


def test_shapes_are_the_published_ones() -> None:
    billions = {"1B": 1.236, "3B": 3.213, "7B": 6.738, "8B": 8.030, "13B": 13.016, "70B": 70.554}
    for name, n in billions.items():
        assert model_of(name).n_params / 1e9 == pytest.approx(n, abs=6e-4)
    assert replace(model_of("8B"), name="8B") == MODELS["8B"]


@pytest.mark.parametrize("card", CARDS)
def test_the_table_takes_seconds_and_needs_nothing(card: str) -> None:
    begun = time.perf_counter()
    found = nbqlora.memory_table(512, card=card, lora_r=64, optim="adamw_8bit")
    assert time.perf_counter() - begun < 10
    assert (found.max_length, found.card, dict(found.settings)) == (512, card, {"lora_r": 64, "optim": "adamw_8bit"})
    assert found.dtype == ("fp16" if card == "T4" else "bf16")
    assert found.as_dict()["rows"][3]["shape"] == "8B"
    assert repr(found) == f"MemoryTable(1B, 3B, 7B, 8B, 13B, 70B; rows of 512 tokens, {card})"


def test_what_it_does_not_take() -> None:
    with pytest.raises(ConfigError) as caught:
        nbqlora.memory_table(512, card="P100", vram_gib=8, model="demo")
    assert str(caught.value) == (
        "3 problems in the options of memory_table\n"
        "  card      expected one of T4, A100, H100, got 'P100'\n"
        "  model     is what the table goes through; leave it out\n"
        "  vram_gib  is what the table goes through; leave it out"
    )
    with pytest.raises(ConfigError, match="lora_rank  unknown key; did you mean lora_r"):
        nbqlora.memory_table(512, lora_rank=8)
