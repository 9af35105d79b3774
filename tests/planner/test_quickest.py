"""The quickest mix that fits: against all mixes there are, where there are few; and never slower with more memory."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.specs import DeviceSpec, LayerPolicy, ModelSpec
from nbqlora.planner import make_plan
from nbqlora.planner.lean import leanest
from nbqlora.planner.limits import Limits, limits_of, usable_host_bytes
from nbqlora.planner.mix import Mix
from nbqlora.planner.quickest import Split
from nbqlora.planner.search import split_of, splits
from tests.planner.shapes import DEVICES, GIB, MODELS, card, cpu, mix_of, options, plan, rows_of

MIB = 1 << 20
N = 6


def few_layers(model: str) -> ModelSpec:
    spec = MODELS[model]
    per_layer = spec.n_linear_params // spec.n_layers
    left_out = (spec.n_layers - N) * per_layer
    return replace(spec, n_layers=N, n_params=spec.n_params - left_out, n_linear_params=N * per_layer)


def all_mixes(split: Split) -> list[Mix]:
    found = []
    for keep, mlp, recompute, offload in itertools.product(range(N + 1), repeat=4):
        join = N - keep - mlp - recompute - offload
        if join < 0 or (join and not (split.memory.joins and recompute + offload)):
            continue
        mix = Mix(keep=keep, recompute_mlp=mlp, recompute=recompute, offload=offload, join=join)
        found += [mix, *(mix.with_tiles(n) for n in split.memory.tiles if keep < N)]
    return found


CASES = {
    "H100": ("8B", DEVICES["H100"], 4096),
    "T4": ("8B", DEVICES["T4"], 4096),
    "long": ("8B", DEVICES["H100"], 32768),
    "copies that nothing hides": ("1B", replace(DEVICES["H100"], matmul_flops=3.2e15), 8192),
    "no rate": ("8B", card("card", 80, bf16=True, flops=None), 2048),
    "stock": ("stock 8B", DEVICES["H100"], 2048),
}


@pytest.mark.parametrize("slots", [0, 2, 4, N])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_none_of_all_mixes_is_quicker(case: tuple[str, DeviceSpec, int], slots: int) -> None:
    model, device, tokens = case
    split = split_of(options(max_length=tokens), few_layers(model), device, rows_of(tokens), "bf16", 1, 4)
    mixes = [m for m in all_mixes(split) if m.offload <= slots]
    taken = {mix: split.memory.total_bytes(mix) for mix in mixes}
    host = slots * split.memory.input_bytes
    low, high = min(taken.values()), max(taken.values())
    assert taken[leanest(split.memory, N, Limits(0, host))] <= low * 1.002
    for limit in [low - 1, *(low + (high - low) * share**3 // 24**3 for share in range(25))]:
        found, fitting = split.quickest(Limits(limit, host)), [m for m in mixes if taken[m] <= limit]
        best = min(map(split.slowness, fitting), default=None)
        if found is None:
            assert not fitting
        else:
            assert best is not None and taken[found] <= limit and found.offload <= slots
            assert split.slowness(found) <= (best[0], best[1] + 1e-9), (found, limit / GIB)


@pytest.mark.parametrize("ram_gib", [6, 0])
@pytest.mark.parametrize("flops", [2.5e13, None])
@pytest.mark.parametrize("model", ["8B", "stock 8B"])
@pytest.mark.parametrize("gib", [8, 10, 12, 15, 24, 40])
def test_no_faster_plan_would_have_fitted(model: str, gib: float, flops: float | None, ram_gib: float | None) -> None:
    config, data, device = options(ram_gib=ram_gib), rows_of(), card("card", gib, bf16=True, flops=flops)
    limits, n = limits_of(config, device), MODELS[model].n_layers
    found = plan(model, device, ram_gib=ram_gib)
    fastest, least, chosen = math.inf, math.inf, None
    for rows, accumulation in splits(config, data):
        split = split_of(config, MODELS[model], device, data, "bf16", rows, accumulation)
        chosen = split if rows == found.micro_batch_size else chosen
        for keep, mlp in ((k, m) for k in range(n + 1) for m in range(n - k + 1)):
            most = min(n - keep - mlp, limits.host_bytes // split.memory.input_bytes)
            for offload in {0, most // 2, most}:
                mix = mix_of(n, keep, mlp, offload=offload)
                if split.memory.total_bytes(mix) <= limits.device_bytes:
                    fastest = min(fastest, split.pace.seconds(mix))
                    least = min(least, split.pace.twice(mix))
    if flops is not None:
        assert found.step_seconds is not None and found.step_seconds <= fastest + 1e-4
    else:
        counts = {p.value: found.layer_policies.count(p) for p in LayerPolicy}
        assert found.step_seconds is None and chosen is not None
        assert chosen.pace.twice(Mix(**counts, tile_tokens=found.mlp_tile_tokens)) <= least + 1e-9


@pytest.mark.parametrize("model", ["8B", "stock 8B"])
def test_inputs_go_to_the_host_only_where_that_is_asked_for_or_nothing_else_fits(model: str) -> None:
    offloads = 0
    for gib in (*(6 + i / 20 for i in range(40)), 10, 15, 24):
        device = card("card", gib, bf16=True, flops=2.5e13)
        try:
            found = plan(model, device)
        except DoesNotFitError:
            continue
        try:
            without = plan(model, device, ram_gib=0)
        except DoesNotFitError:
            offloads += 1
            assert found.host_bytes
        else:
            assert not found.host_bytes and found.layer_policies == without.layer_policies
    assert offloads


@pytest.mark.parametrize("ram_gib", [None, 0])
@pytest.mark.parametrize("flops", [2.5e13, None])
@pytest.mark.parametrize("model", ["1B", "8B", "13B", "stock 8B"])
def test_more_memory_never_makes_a_plan_slower(model: str, flops: float | None, ram_gib: float | None) -> None:
    before: tuple[float, float] = (math.inf, math.inf)
    for gib in (7, 8, 9, 10, 11, 12, 14, 16, 20, 24, 32, 40, 48, 80, 160, 400):
        device = card("card", gib, bf16=True, flops=flops)
        try:
            found = plan(model, device, ram_gib=ram_gib)
        except DoesNotFitError:
            assert math.isinf(before[0]) and gib < 16
            continue
        split = split_of(options(), MODELS[model], device, rows_of(), "bf16", found.micro_batch_size, 1)
        counts = {p.value: found.layer_policies.count(p) for p in LayerPolicy}
        now = (found.step_seconds or 0.0, split.pace.twice(Mix(**counts, tile_tokens=found.mlp_tile_tokens)))
        assert now[0] <= before[0] + 1e-4 and (flops is not None or now[1] <= before[1] + 1e-9)
        before = now
    assert before[1] == 0  # 400 GiB keep everything


def test_more_host_memory_never_makes_a_plan_slower() -> None:
    before = math.inf
    for ram_gib in (0, 0.25, 0.5, 1, 2, 4):
        found = plan("8B", "H100", tokens=4096, vram_gib=7.5, ram_gib=ram_gib)
        assert found.host_bytes <= ram_gib * GIB and found.step_seconds is not None
        assert found.step_seconds <= before + 1e-4
        before = found.step_seconds
    assert found.host_bytes > 0


def test_how_much_of_the_hosts_memory_may_be_taken() -> None:
    def usable(free_gib: float, ram_gib: float | None = None, device: DeviceSpec = DEVICES["T4"]) -> float:
        where = replace(device, host_free_bytes=int(free_gib * GIB))
        return usable_host_bytes(options(ram_gib=ram_gib), where) / GIB

    assert [usable(n) for n in (2, 3, 4, 6, 12, 100)] == [0, 0, 1, 3, 6, 50]
    assert [usable(12, n) for n in (0, 2.5, 20)] == [0, 2.5, 12]
    assert usable(12, device=cpu()) == usable(12, 4, device=cpu()) == 0


def long(tokens: int, *, vram_gib: float, **changes: Any) -> Any:
    """One row a step of exactly so many tokens."""
    data = replace(rows_of(tokens), percentiles=(tokens,) * 5)
    config = options(max_length=tokens, vram_gib=vram_gib, effective_batch_size=1, **changes)
    return make_plan(config, MODELS["8B"], DEVICES["H100"], data, output_dir="out")


def test_what_does_not_fit_otherwise_offloads_runs_in_tiles_and_joins() -> None:
    found = long(32768, vram_gib=11, ram_gib=4)
    assert found.mlp_tile_tokens in (512, 1024, 2048, 4096, 8192, 16384)
    assert {LayerPolicy.OFFLOAD, LayerPolicy.JOIN} <= set(found.layer_policies)
    assert found.host_bytes <= 4 * GIB and found.predicted_peak_bytes <= 11 * GIB
    because = {d.name: d.because for d in found.decisions}
    assert "one layer fewer that joins would be " in because["layers"]
    assert "whole MLPs would be " in because["MLP"] and because["host RAM"].endswith("ram_gib allows 4.0 GiB")
    assert found.unknowns == (
        "how fast inputs go to the host and back: 25 GB/s are counted, and RAM that can be pinned",
    )


def test_adapters_that_drop_have_no_tiles_and_a_plan_says_so() -> None:
    found = long(16384, vram_gib=10, lora_dropout=0.1)
    assert not found.mlp_tile_tokens
    because = {d.name: (d.value, d.because) for d in found.decisions}
    assert because["MLP"] == ("whole", "lora_dropout draws by place, which tiles would change")


def test_layers_that_are_pinned_get_tiles_where_nothing_else_helps() -> None:
    whole = long(16384, vram_gib=40, gradient_checkpointing="offload")
    tight = long(16384, vram_gib=8, gradient_checkpointing="offload")
    assert not whole.mlp_tile_tokens and tight.mlp_tile_tokens
    assert whole.layer_policies == tight.layer_policies == (LayerPolicy.OFFLOAD,) * 32
    assert whole.host_bytes == tight.host_bytes == 32 * 16384 * 4096 * 2
