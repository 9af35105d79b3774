"""The moments that count, found by a few sums: the same as going through all layers one by one, for random mixes."""

from __future__ import annotations

import random

import pytest

from nbqlora.core.specs import LayerPolicy
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.estimate import memory_of
from nbqlora.planner.fused_memory import FusedMemory
from nbqlora.planner.mix import Mix
from nbqlora.planner.moments import LayerBytes, layer_bytes, moments
from tests.planner.shapes import DEVICES, MODELS, options

OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN


def one_by_one(layer: LayerBytes, policies: tuple[LayerPolicy, ...]) -> tuple[int, int]:
    """What is stored at the end of the forward, and the peak, with every input followed by its layer's number."""
    held = {i: layer.stored[p] for i, p in enumerate(policies)}
    peak = max(sum(held[j] for j in range(i)) + layer.x + layer.forward[p] for i, p in enumerate(policies))
    stored = sum(held.values())
    inputs: set[int] = set()  # on the card beside what is stored
    offloading = [i for i, p in enumerate(policies) if p is OFFLOAD]
    for i in reversed(range(len(policies))):
        policy, last = policies[i], i == len(policies) - 1
        head = i
        while policies[head] is JOIN:
            head -= 1
        of_a_group_the_first = last or policies[i + 1] is not JOIN
        if of_a_group_the_first and policies[head] is OFFLOAD:  # its input comes, and the next one sets out
            inputs |= {head, max((j for j in offloading if j < head), default=head)}
        if i not in inputs and policy is JOIN:  # the forwards before it run again
            for j in range(head + 1, i + 1):
                gradient = layer.x if last else layer.gradient
                peak = max(peak, sum(held.values()) + layer.x * len(inputs) + gradient + layer.forward[JOIN])
                inputs.add(j)
        peak = max(peak, sum(held.values()) + layer.x * len(inputs) + layer.backward[policy, last])
        del held[i]
        inputs.discard(i)
    assert not inputs
    return stored, peak


@pytest.mark.parametrize("device,captured", [("H100", True), ("T4", True), ("CPU", False)])
@pytest.mark.parametrize("tile", [0, 512])
def test_as_one_by_one(device: str, captured: bool, tile: int) -> None:
    batch = MicroBatch(rows=2, row_tokens=1024, supervised_tokens=2048)
    memory = memory_of(options(), MODELS["1B"], DEVICES[device], "fp16", batch)
    assert isinstance(memory, FusedMemory) and bool(memory.behind) == captured
    layer, numbers = layer_bytes(memory.layer, tile, memory.behind), random.Random(0)
    seen = 0
    for _ in range(1500):
        n = [numbers.choice((0, 0, 1, 2, 5, 9)) for _ in range(5)]
        mix = Mix(keep=n[0], recompute_mlp=n[1], recompute=n[2], offload=n[3], join=n[4] if n[2] + n[3] else 0)
        if mix.n_layers:
            assert moments(layer, mix) == one_by_one(layer, mix.policies), mix
            seen += bool(mix.join)
    assert seen > 400


def test_bytes_by_hand() -> None:
    """Of x alone: 8 layers in groups of 4 on the host keep nothing; two come back, and three more are made."""
    layer = LayerBytes(
        x=1000,
        stored={p: {"offload": 0, "join": 0, "recompute": 1000}.get(p.value, 5000) for p in LayerPolicy},
        forward=dict.fromkeys(LayerPolicy, 100),
        backward={(p, last): 200 for p in LayerPolicy for last in (True, False)},
        gradient=10,
    )
    assert moments(layer, Mix(offload=8)) == (0, 2200)
    assert moments(layer, Mix(recompute=8)) == (8000, 8200)
    assert moments(layer, Mix(offload=2, join=6)) == (0, 5200)  # its own and the next one's, and three
    assert moments(layer, Mix(recompute=2, join=6)) == (2000, 5200)  # groups of 5 and 3: two are stored, four made
    assert moments(layer, Mix(offload=1, join=7)) == (0, 8200)
