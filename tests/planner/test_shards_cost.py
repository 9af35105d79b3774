"""Weights that are split over cards: what that takes of each, how long a step is then, and how a plan says it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from nbqlora.core.errors import ConfigError
from nbqlora.core.specs import BatchLayout, DeviceSpec, LayerPolicy, MemoryCategory
from nbqlora.engine.micro_step import not_captured_because
from nbqlora.engine.sharded import ShardedLayer, ShardedWeights
from nbqlora.planner import make_plan, shards
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.estimate import budget
from nbqlora.planner.known import model_of
from nbqlora.planner.mix import all_kept
from nbqlora.planner.pace import Pace
from nbqlora.planner.search import split_of
from nbqlora.planner.standing import weight_bytes
from nbqlora.planner.table import check_table, memory_table
from nbqlora.run.identity import identity
from nbqlora.run.resume import plan_facts
from nbqlora.view.text import plan_text
from tests.planner.live_bytes import allocated_peak
from tests.planner.several import MODEL, PAIR_24, PAIR_80, T4S, plan, row
from tests.planner.shapes import DEVICES, GIB, cpu, mix_of, options, rows_of
from tests.planner.test_dry_run import dry_layer

# Memory.


@pytest.fixture
def no_others() -> Iterator[None]:
    """A group whose other ranks are not there, so that torch's own FSDP runs here as on one of several cards."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    yield FakeStore()
    dist.destroy_process_group()


class Linear(nn.Module):
    """A linear's packed weight alone."""

    def __init__(self, n_bytes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_bytes, dtype=torch.uint8), requires_grad=False)


def forward_and_backward(weights: ShardedWeights) -> None:
    """Two micro-batches, as layers open their weights."""
    places = range(len(weights.layers))
    for _ in range(2):
        weights.begin_pass(trains=True)
        for place in (*places, *reversed(places)):
            with weights.opened(place):
                pass
    weights.finish_pass()


@pytest.mark.parametrize(("shape", "n"), [("8B", 2), ("1B", 3)])
def test_shares_and_gathers_are_the_engines(shape: str, n: int, no_others: Any, tmp_path: Path) -> None:
    real, spec = dry_layer(shape, "bf16", BatchLayout.PACKED).real, model_of(shape)
    packed = {p.name: p.weight.packed.nbytes for group in real.groups for p in group.projections}
    assert sum(packed.values()) == shards.layer_bytes(spec)
    dist.init_process_group("fake", store=no_others, rank=0, world_size=n)
    mesh, card = init_device_mesh("cpu", (n,)), torch.device("cpu")
    layers = [ShardedLayer({k: Linear(size) for k, size in packed.items()}, mesh, card) for _ in range(3)]
    each = {layer.share.nbytes for layer in layers}
    assert each == {shards.share_bytes(spec, n)}
    weights = ShardedWeights(layers)
    forward_and_backward(weights)
    found = allocated_peak(lambda: forward_and_backward(weights), tmp_path / "trace.json")
    assert 0.99 * found <= shards.gathered_bytes(spec, n) <= 1.03 * found
    config = options(gpus=n, fsdp=True)
    others = weight_bytes(spec, replace(config, fsdp=False), 2) - spec.n_layers * sum(packed.values())
    counted = spec.n_layers * each.pop() + found
    assert 0.99 * counted <= weight_bytes(spec, config, 2) - others <= 1.03 * counted


@pytest.mark.parametrize("n", [2, 3, 8])
@pytest.mark.parametrize("shape", ["1B", "70B"])
def test_nothing_but_the_weights_is_otherwise(shape: str, n: int) -> None:
    spec, batch = MODEL[shape], MicroBatch(rows=1, row_tokens=512, supervised_tokens=512)
    mix = mix_of(spec.n_layers, 4, 4)
    split, whole = (budget(options(gpus=n, fsdp=x), spec, cpu(64), "fp32", batch, mix) for x in (True, False))
    spared = spec.n_layers * (shards.layer_bytes(spec) - shards.share_bytes(spec, n))
    assert whole.total_bytes - split.total_bytes == spared - 2 * n * shards.share_bytes(spec, n)
    differs = {k for k in whole.by_category if whole.by_category[k] != split.by_category[k]}
    assert differs == {MemoryCategory.WEIGHTS}


def test_no_step_is_captured_and_nothing_is_held_for_it() -> None:
    spec, device = MODEL["8B"], DEVICES["H100"]
    batch = MicroBatch(rows=2, row_tokens=2048, supervised_tokens=4096)
    split, whole = (budget(options(gpus=2, fsdp=x), spec, device, "bf16", batch, all_kept(32)) for x in (True, False))
    m = MemoryCategory
    assert split.by_category[m.ACTIVATIONS] < whole.by_category[m.ACTIVATIONS]
    assert row(plan("8B", PAIR_80, fsdp=True), "step") == ("eager", shards.NOT_CAPTURED)
    engine: Any = SimpleNamespace(complete=True, last_norm=object(), layers={}, shards=object())
    found = not_captured_because(engine, torch.device("cuda"), lambda model, batch: None)  # type: ignore[arg-type,return-value]
    assert found == shards.NOT_CAPTURED


def test_no_layer_joins() -> None:
    tight = plan("32B", T4S, optim="adamw_8bit")
    assert LayerPolicy.JOIN not in tight.layer_policies and tight.mlp_tile_tokens
    for gib in (5.5, 5.8, 6.2, 7):
        found = plan("8B", PAIR_24, tokens=2048, fsdp=True, vram_gib=gib, ram_gib=0)
        assert LayerPolicy.JOIN not in found.layer_policies
    with_host = plan("8B", PAIR_24, tokens=15616, fsdp=True, vram_gib=7)
    assert LayerPolicy.OFFLOAD in with_host.layer_policies


# Time.


def pace_of(device: DeviceSpec, *, accumulation: int = 1, split: bool = True, n: int = 2) -> Pace:
    config, data = options(gpus=n, fsdp=split, max_length=1024), rows_of(1024)
    return split_of(config, MODEL["8B"], device, data, "bf16", 1, accumulation).pace


def test_a_gather_hides_behind_work_or_decides() -> None:
    spec, mix = MODEL["8B"], all_kept(32)
    sent = shards.layer_bytes(spec) // 2
    quick, slow = (pace_of(replace(PAIR_24, link_bytes_per_second=rate)) for rate in (1e12, 1e8))
    assert quick.gather == pytest.approx(sent / 1e12)
    assert quick.gathering(mix) == pytest.approx(quick.gather)  # the first
    assert slow.gather == pytest.approx(sent / 1e8)
    # All gathers, one after the other; beside none of them run the head, one forward and one backward.
    head = slow.kept - 32 * slow.layer
    slower = max(1.0, slow.host[0] / slow.kept)  # where launching takes longer
    assert slow.seconds(mix) == pytest.approx(63 * slow.gather + slower * (head + slow.layer), rel=1e-6)
    assert pace_of(PAIR_24, split=False).gathering(mix) == 0


def test_layers_that_compute_again_have_more_to_hide_a_gather_behind() -> None:
    pace = replace(pace_of(PAIR_24), host=(0.0, 0.0))
    recomputes, keeps = (pace.beside(mix)[1][1] for mix in (mix_of(32), all_kept(32)))
    assert keeps < recomputes
    pace = replace(pace, gather=(keeps + recomputes) / 2)
    waits = [pace.gathering(mix_of(32, n)) - pace.gathering(mix_of(32)) for n in (0, 16, 32)]
    assert waits == pytest.approx([n * (recomputes - keeps) / 2 for n in (0, 16, 31)])
    assert pace.seconds(mix_of(32)) > pace.seconds(all_kept(32))


def test_each_micro_batch_gathers_all_layers_twice_but_the_last() -> None:
    one, four = pace_of(PAIR_24), pace_of(PAIR_24, accumulation=4)
    assert four.gather == pytest.approx(4 * one.gather)
    found = plan("32B", T4S, optim="adamw_8bit")
    n = found.gradient_accumulation_steps
    assert found.gathered_bytes == n * (64 + 63) * (MODEL["32B"].n_linear_params // 64 // 4)
    assert found.sent_bytes == plan("32B", replace(T4S, free_bytes=40 * GIB)).sent_bytes


def test_the_plan_says_what_is_split_what_is_sent_and_what_decides() -> None:
    value, because = row(plan("32B", T4S, optim="adamw_8bit"), "weights")
    assert value == "split over 2 cards (FSDP)"
    parts = because.split("; ")
    assert parts[:3] == [
        "whole on each card, 19.9 GiB would be needed",
        "7.3 GiB of the layers' 14.5 GiB on each and 0.45 GiB for two gathered ones",
        "115 GiB sent a step",
    ]
    assert parts[3].startswith("a layer's weights take 12.2 ms, computing ") and ": computing decides, +" in parts[3]
    slow = row(plan("32B", replace(T4S, link_bytes_per_second=1e8), optim="adamw_8bit"), "weights")[1]
    assert "a layer's weights take 1.22e+03 ms" in slow and ": the link decides, +" in slow
    assert row(plan("8B", T4S, fsdp=True), "weights")[1].startswith("pinned by fsdp; ")
    unknown = row(plan("8B", replace(T4S, matmul_flops=None), fsdp=True), "weights")[1]
    assert unknown.endswith("and how long it computes is not known")


def test_text_and_plain_values_carry_it() -> None:
    found = plan("32B", T4S, optim="adamw_8bit")
    assert "split over 2 cards (FSDP)" in plan_text(found)
    plain = json.loads(json.dumps(found.as_dict()))
    assert (plain["shards"], plain["gathered_bytes"]) == (2, found.gathered_bytes)


def test_ranks_must_agree_on_it_and_runs_need_not() -> None:
    whole, split = plan("8B", T4S), plan("8B", T4S, fsdp=True)
    assert (plan_facts(whole)["shards"], plan_facts(split)["shards"]) == (1, 2)

    class Words:
        chat_template = ""

        def __len__(self) -> int:
            return 9

    alike = [identity(options(gpus=2, fsdp=x), p, "m", Words()) for x, p in (("auto", whole), (True, split))]
    assert alike[0] == alike[1]


def test_making_nf4_in_too_little_ram_is_said() -> None:
    words = "RAM: making NF4 of this checkpoint takes "
    poor = replace(T4S, host_free_bytes=16 * GIB)
    assert [n for n in plan("32B", poor, optim="adamw_8bit").notes if n.startswith(words)] == [
        f"{words}17.9 GiB there, and 16.0 GiB are free; "
        "a checkpoint that is stored in NF4 is read from its files and needs none of it"
    ]
    assert not [n for n in plan("32B", T4S, optim="adamw_8bit").notes if n.startswith(words)]
    stored = replace(MODEL["32B"], quantized=True)
    found = make_plan(options(gpus=2, optim="adamw_8bit"), stored, poor, rows_of(), output_dir="r")
    assert not [n for n in found.notes if n.startswith(words)]


def test_the_table_of_usual_models_is_that_of_each_card() -> None:
    whole, split = (memory_table(options(gpus=2, fsdp=x), "A100", ("8B",)).rows[0] for x in (False, True))
    spec = model_of("8B")
    spared = shards.spared_bytes(spec, 2) - shards.gathered_bytes(spec, 2)
    assert whole.all_kept_bytes - split.all_kept_bytes == pytest.approx(spared, rel=0.01)
    assert split.minimum_bytes < whole.minimum_bytes
    with pytest.raises(ConfigError, match="over how many cards weights are split has to be said; write gpus = 2"):
        check_table("A100", {"fsdp": True})
