"""How long a step takes: an H100's measurements within 10 %, and what makes a step longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbqlora.planner.estimate import pace_of
from nbqlora.planner.pace import Load, Pace
from tests.planner.shapes import DEVICES, MODELS, options

# Milliseconds of a step on an H100, captured, torch 2.11.
MEASURED = {
    "8B 2 x 2048, all kept": ("8B", "bf16", 2, 2048, 0, 254),
    "8B 2 x 2048, all recomputed": ("8B", "bf16", 2, 2048, 32, 334),
    "8B 2 x 512": ("8B", "fp16", 2, 512, 0, 74),
    "1B 4 x 2048": ("1B", "bf16", 4, 2048, 0, 98.7),
    "1B 4 x 512": ("1B", "bf16", 4, 512, 0, 25.9),
}
STOCK = {"2 x 2048": (2, 2048, 435), "2 x 512": (2, 512, 214)}


def pace(
    model: str = "8B",
    device: str = "H100",
    dtype: str = "bf16",
    *,
    rows: int = 2,
    tokens: int = 2048,
    accumulation: int = 1,
    load_in_4bit: bool = True,
    **changes: Any,
) -> Pace:
    load = Load(tokens=rows * tokens, attended=tokens, supervised_share=1.0, accumulation=accumulation)
    where = replace(DEVICES[device], **changes)
    return pace_of(options(load_in_4bit=load_in_4bit), MODELS[model], where, dtype, load, dense=True)


@pytest.mark.parametrize("case", MEASURED.values(), ids=MEASURED)
def test_fused_layers_on_an_h100(case: Any) -> None:
    model, dtype, rows, tokens, recomputed, milliseconds = case
    found = pace(model, dtype=dtype, rows=rows, tokens=tokens).seconds(recomputed, 0)
    assert found * 1000 == pytest.approx(milliseconds, rel=0.03)


@pytest.mark.parametrize("case", STOCK.values(), ids=STOCK)
def test_stock_layers_on_an_h100(case: Any) -> None:
    rows, tokens, milliseconds = case
    assert pace("stock 8B", rows=rows, tokens=tokens).seconds(0, 0) * 1000 == pytest.approx(milliseconds, rel=0.1)


def test_an_mlp_costs_less_than_a_layer() -> None:
    found = pace()
    assert 0 < found.recomputed_mlp < found.recomputed
    assert found.seconds(3, 4) == pytest.approx(found.kept + 3 * found.recomputed + 4 * found.recomputed_mlp)
    assert found.twice(3, 0) == 3 < found.twice(3, 4) < 7


def test_weights_are_unpacked_for_each_micro_batch() -> None:
    # 6.98e9 parameters, twice, 0.516 bytes read and 2 written, at 93 % of 3.0 TB/s.
    once = pace(rows=4).kept
    twice = pace(rows=2, accumulation=2).kept
    gaps = 32 * 0.00014
    assert twice - once == pytest.approx(2 * 6.98e9 * 2.516 / 0.93 / 3.0e12 + gaps, rel=0.01)
    assert pace(rows=2, load_in_4bit=False).kept == pytest.approx(pace(rows=2).kept - (twice - once - gaps), rel=1e-3)


def test_a_measured_copy_counts() -> None:
    derived = pace(copy_bytes_per_second=None).kept
    assert pace(copy_bytes_per_second=7.9e14 / 263).kept == pytest.approx(derived)
    assert pace(copy_bytes_per_second=1.5e12).kept > derived * 1.2


def test_an_eager_step_waits_for_the_host() -> None:
    gemma = replace(MODELS["1B"], architecture="gemma2")
    load = Load(tokens=64, attended=64, supervised_share=1.0, accumulation=2)
    found = pace_of(options(), gemma, DEVICES["H100"], "bf16", load, dense=True)
    assert found.seconds(0, 0) == pytest.approx(2 * 16 * 0.0031)
    assert found.seconds(3, 0) == pytest.approx(2 * 17 * 0.0031)


def test_without_a_rate_paces_are_only_compared() -> None:
    found = pace(matmul_flops=None)
    assert not found.measured and found.recomputed_mlp < found.recomputed
