"""Whose turn it is to be gathered, and what is said where weights cannot be split; gathering itself needs several ranks
(tests/train/test_sharded_ranks.py)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.fused import engine_of
from nbqlora.engine.micro_step import not_captured_because
from nbqlora.engine.optimize import optimize
from nbqlora.engine.projection import unpack
from nbqlora.engine.sharded import ShardedWeights
from nbqlora.hub.load_sharded import check_can_split
from nbqlora.kernels.nf4 import Nf4
from nbqlora.run import make_plan
from tests import tiny


class Recorded:
    """A layer that writes down what is asked of it; its first gathers may fail."""

    def __init__(self, place: int, log: list[str]) -> None:
        self.place, self.log = place, log
        self.coming = self.is_open = False
        self.fails = 0

    def gather(self) -> None:
        if self.coming:
            return
        if self.fails:
            self.fails -= 1
            raise torch.OutOfMemoryError
        self.coming = True
        self.log.append(f"gather {self.place}")

    def open(self) -> None:
        assert self.coming
        self.coming, self.is_open = False, True
        self.log.append(f"open {self.place}")

    def close(self) -> None:
        self.is_open = False
        self.log.append(f"close {self.place}")


def weights(n: int = 3) -> tuple[ShardedWeights, list[Recorded], list[str]]:
    log: list[str] = []
    layers = [Recorded(place, log) for place in range(n)]
    return ShardedWeights(layers), layers, log  # type: ignore[arg-type]


def use(found: ShardedWeights, log: list[str], *places: int) -> None:
    for place in places:
        with found.opened(place):
            log.append(f"use {place}")


def gathers(log: list[str]) -> list[int]:
    return [int(line.split()[1]) for line in log if line.startswith("gather")]


def test_the_next_layer_comes_while_one_is_at_work_and_the_last_one_stays() -> None:
    found, layers, log = weights()
    found.begin_pass(trains=True)
    use(found, log, 0, 1, 2)
    assert [layer.is_open for layer in layers] == [False, False, True], "the head's loss comes between"
    use(found, log, 2, 1, 0)
    assert log == [
        "gather 0", "open 0", "gather 1", "use 0", "close 0", "open 1", "gather 2", "use 1", "close 1",
        "open 2", "gather 1", "use 2", "use 2", "close 2", "open 1", "gather 0", "use 1", "close 1",
        "open 0", "use 0", "close 0",
    ]  # fmt: skip
    assert found.passes == 1


def test_an_evaluation_goes_up_alone() -> None:
    found, layers, log = weights()
    found.begin_pass(trains=False)
    use(found, log, 0, 1, 2)
    assert gathers(log) == [0, 1, 2]
    assert not any(layer.is_open or layer.coming for layer in layers)


@pytest.mark.parametrize(
    ("first", "expected"), [(0, [0, 1, 2, 1, 0]), (1, [0, 1, 2, 1]), (2, [0, 1, 2]), (3, [0, 1, 2])]
)
def test_no_layer_is_gathered_for_a_backward_that_does_not_run(first: int, expected: list[int]) -> None:
    found, layers, log = weights()
    found.trains_from = first
    found.begin_pass(trains=True)
    use(found, log, 0, 1, 2)
    assert layers[2].is_open == (first < 3)
    use(found, log, *range(2, first - 1, -1))
    assert gathers(log) == expected
    assert not any(layer.is_open or layer.coming for layer in layers)


@pytest.mark.parametrize("done", range(7))
def test_a_pass_that_broke_off_gathers_as_often_as_a_whole_one(done: int) -> None:
    found, layers, log = weights()
    found.begin_pass(trains=True)
    use(found, log, *(0, 1, 2, 2, 1, 0)[:done])
    found.catch_up(3, trains=True)
    assert gathers(log) == [0, 1, 2, 1, 0] * 3
    assert found.passes == 3
    assert not any(layer.is_open or layer.coming for layer in layers)


def test_where_there_is_no_room_for_a_gather_it_is_tried_again() -> None:
    found, layers, log = weights()
    layers[2].fails = 2
    found.begin_pass(trains=True)
    use(found, log, 0)
    with pytest.raises(torch.OutOfMemoryError):
        use(found, log, 1)
    assert layers[1].is_open
    with pytest.raises(torch.OutOfMemoryError):
        found.catch_up(2, trains=True)
    assert not layers[1].is_open
    found.catch_up(2, trains=True)
    assert gathers(log) == [0, 1, 2, 1, 0] * 2


def test_a_layer_out_of_turn_is_refused_and_closed() -> None:
    found, layers, _ = weights()
    found.begin_pass(trains=False)
    with pytest.raises(RuntimeError, match=r"layer 2 was asked for out of turn, as 0 of \(0, 1, 2\)"):
        use(found, [], 2)
    found.finish_pass()
    with pytest.raises(RuntimeError, match="layer 0 was asked for out of turn"):
        use(found, [], 0)
    assert not any(layer.is_open for layer in layers)


def test_a_weight_that_is_not_there_is_not_read() -> None:
    weight = Nf4(
        packed=torch.empty(0, dtype=torch.uint8), absmax=torch.ones(4), code=torch.zeros(16), n_rows=4, n_cols=64
    )
    with pytest.raises(RuntimeError, match="a weight of 4 x 64 is used while it is not there"):
        unpack(weight, torch.empty(4, 64))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            r"splits each layer's weights over 2 cards, and 1 train together; start as many with gpus = 2 or torchrun",
        ),
        ({"shards": 1, "load_in_4bit": False}, "only 4-bit weights are split over cards; set load_in_4bit = true"),
        ({"shards": 1, "layer_policies": (LayerPolicy.RECOMPUTE, LayerPolicy.JOIN)}, "cannot join, .*recompute or off"),
    ],
)
def test_what_cannot_be_split_is_said_before_anything_is_loaded(
    changes: dict[str, Any], message: str, folder: Path
) -> None:
    plan = make_plan(CellRequest(options={"model": str(folder), "data": tiny.make_rows(4)}))
    with pytest.raises(ModelError, match=message) as caught:
        check_can_split(replace(plan, **{"shards": 2, **changes}))
    assert "fsdp = false" in str(caught.value)


def test_split_weights_are_not_captured() -> None:
    model = tiny.with_lora(tiny.make_model())
    optimize(model)
    engine = engine_of(model)
    assert engine is not None
    engine.shards = weights()[0]
    because = not_captured_because(engine, torch.device("cuda"), lambda *_: (torch.ones(()), torch.ones(())))
    assert because == "each layer's weights are gathered from all cards when its turn comes"


def test_all_layers_have_to_be_fused(folder: Path) -> None:
    """Nothing but a fused layer gathers its weights."""
    from nbqlora.engine.sharded import ATTRIBUTE

    model = tiny.with_lora(tiny.make_model("cohere"))
    model.get_base_model().__dict__[ATTRIBUTE] = weights()[0]
    with pytest.raises(ModelError, match=r"where every layer is a fused one .*; set fsdp = false"):
        optimize(model)
