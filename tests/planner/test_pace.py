"""How long a step takes: an H100's measurements within 10 %, and what makes a step longer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbqlora.planner.estimate import pace_of
from nbqlora.planner.pace import Load, Pace
from tests.planner.shapes import DEVICES, MODELS, mix_of, options

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
    n = MODELS[model].n_layers
    found = pace(model, dtype=dtype, rows=rows, tokens=tokens).seconds(mix_of(n, n - recomputed))
    assert found * 1000 == pytest.approx(milliseconds, rel=0.03)


@pytest.mark.parametrize("case", STOCK.values(), ids=STOCK)
def test_stock_layers_on_an_h100(case: Any) -> None:
    rows, tokens, milliseconds = case
    found = pace("stock 8B", rows=rows, tokens=tokens).seconds(mix_of(32, 32))
    assert found * 1000 == pytest.approx(milliseconds, rel=0.1)


def test_an_mlp_costs_less_than_a_layer() -> None:
    found = pace()
    assert 0 < found.recomputed_mlp < found.recomputed
    assert found.seconds(mix_of(32, 25, 4)) == pytest.approx(
        found.kept + 3 * found.recomputed + 4 * found.recomputed_mlp
    )
    assert found.twice(mix_of(32, 29)) == pytest.approx(3)
    assert 3 < found.twice(mix_of(32, 25, 4)) < 7


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
    assert found.seconds(mix_of(16, 16)) == pytest.approx(2 * 16 * 0.0031)
    assert found.seconds(mix_of(16, 13)) == pytest.approx(2 * 17 * 0.0031)


def test_without_a_rate_paces_are_only_compared() -> None:
    found = pace(matmul_flops=None)
    assert not found.measured and found.recomputed_mlp < found.recomputed


def test_a_layer_that_joins_is_run_forward_once_more() -> None:
    found = pace()
    base, joined = mix_of(32), mix_of(32, join=24)
    assert found.seconds(joined) - found.seconds(base) == pytest.approx(24 * found.forward)
    # A whole forward is more than what is computed again, which stops before the down projection, and about a third
    # of forward and backward.
    assert found.recomputed < found.forward < found.layer / 2
    assert found.twice(joined) - found.twice(base) == pytest.approx(24 * found.forward / found.recomputed)


def test_each_further_tile_unpacks_the_mlp_again() -> None:
    # 8 times 4096 x 14336 weights, 0.516 bytes read and 2 written, at 93 % of 3.0 TB/s; and an eighth of a gap.
    each = 8 * 4096 * 14336 * 2.516 / 0.93 / 3.0e12 + 0.00014 / 8
    found = pace()
    whole = found.seconds(mix_of(32, 4, 8))
    for tokens, more in ((4096, 0), (2048, 1), (1024, 3), (1000, 4)):
        in_tiles = mix_of(32, 4, 8, tile_tokens=tokens)
        assert found.seconds(in_tiles) - whole == pytest.approx(28 * more * each, rel=0.01, abs=1e-9)
    assert pace(load_in_4bit=False).tile < found.tile / 10


@pytest.mark.parametrize("device,rate", [("T4", 12e9), ("H100", 25e9)])
def test_copies_of_inputs_hide_behind_what_is_computed(device: str, rate: float) -> None:
    found, tokens = pace("8B", device, "fp16"), 2 * 2048
    assert found.copy == pytest.approx(tokens * 4096 * 2 / rate)
    base, offloads = mix_of(32, 8), mix_of(32, 8, offload=24)
    assert found.copy < found.forward  # all but the first that comes back
    assert found.seconds(offloads) - found.seconds(base) == pytest.approx(found.copy + 24 * 40e-6)


def test_copies_that_take_longer_than_the_work_beside_them_are_waited_for() -> None:
    found = pace("1B", rows=4, matmul_flops=1.6e15)  # twice an H100's
    assert found.copy == pytest.approx(4 * 2048 * 2048 * 2 / 25e9)
    assert found.copy > found.forward
    more = found.seconds(mix_of(16, offload=16)) - found.seconds(mix_of(16))
    back = found.layer - found.forward + found.recomputed
    assert found.copy < back  # in the backward there is enough beside them
    assert more == pytest.approx(16 * (found.copy - found.forward) + found.copy + 16 * 40e-6)
    # Where others join, their forwards are beside it too.
    joined = found.seconds(mix_of(16, offload=8, join=8)) - found.seconds(mix_of(16, join=8))
    assert joined == pytest.approx(found.copy + 8 * 40e-6)


def test_without_a_rate_copies_count_for_little_and_joining_for_a_layer() -> None:
    found = pace(matmul_flops=None)
    assert found.twice(mix_of(32)) < found.twice(mix_of(32, offload=32)) < found.twice(mix_of(32)) + 0.1
    assert found.twice(mix_of(32, join=1)) > found.twice(mix_of(32)) + 1


def test_the_mlp_of_stock_layers_is_its_share_of_their_weights() -> None:
    found = pace("stock 8B")
    share = found.recomputed_mlp / found.recomputed
    assert share == pytest.approx(3 * 4096 * 14336 / (3 * 4096 * 14336 + 2.5 * 4096**2), rel=0.1)
    assert found.seconds(mix_of(32, 20, 12)) == pytest.approx(found.kept + 12 * found.recomputed_mlp)
