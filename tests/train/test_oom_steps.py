"""Out of memory in training, at every point: the run goes on, with the losses and the adapter it would have had."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.layer import Layer
from tests.train.parts import parts
from tests.train.shortages import EACH_LAYOUT, LAYOUTS, ROWS, STEPS, Outcome, Shortages, model, short, whole

__all__ = ["model", "short", "whole"]  # fixtures
KEEP, MLP, ALL, OFFLOAD = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE, LayerPolicy.OFFLOAD
# The first layer of the first micro-batch, the middle of the second one, the last step's second one.
MOMENTS = {"first": 1, "second": 5, "late": 3 * 6 - 1}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("place", ["forward", "backward"])
@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_once_at_any_point_changes_nothing(
    layout: str, place: str, moment: str, model: Path, tmp_path: Path, whole: Any, short: Shortages
) -> None:
    options = {**LAYOUTS[layout], "lora_dropout": 0.1}
    expected = whole(**options)
    short.at(place, MOMENTS[moment])
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **options), short)
    assert short.failed == [place]
    assert found.same_as(expected)
    (event,) = found.shortages
    step = STEPS if moment == "late" else 1
    assert (event.step, event.phase, event.asked_bytes) == (step, place, 2 << 30)
    assert event.action == "unused memory was given back"


def at_most(tokens: int) -> Callable[[Layer, torch.Tensor], bool]:
    return lambda layer, x: x.numel() // x.shape[-1] > tokens


def until(policies: set[LayerPolicy]) -> Callable[[Layer, torch.Tensor], bool]:
    return lambda layer, x: layer.policy not in policies


@pytest.mark.parametrize("place", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
@pytest.mark.parametrize("layout", EACH_LAYOUT)
@pytest.mark.parametrize(
    "policies,ram_bytes,expected",
    [({MLP, ALL}, 0, MLP), ({ALL}, 0, ALL), ({OFFLOAD}, 1 << 30, OFFLOAD)],
    ids=["mlp", "all", "offload"],
)
def test_layers_keep_less_with_equal_bits(
    policies: set[LayerPolicy], ram_bytes: int, expected: LayerPolicy, layout: str, place: str, model: Path,
    tmp_path: Path, whole: Any, short: Shortages,
) -> None:  # fmt: skip
    options = {**LAYOUTS[layout], "lora_dropout": 0.1}
    before = whole(**options)
    short.when(place, until(policies))
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, ram_bytes=ram_bytes, **options), short)
    assert found.same_as(before)
    plan = found.parts.loaded.plan
    assert plan is not None and set(plan.layer_policies) == {expected}
    assert {e.step for e in found.shortages} == {1}
    assert (plan.host_bytes > 0) == (expected is OFFLOAD)


MANY = {"per_device_train_batch_size": 12, "gradient_accumulation_steps": 1, "effective_batch_size": None}


@pytest.mark.parametrize("layout", [{"padding_free": False, **MANY}, MANY], ids=["padded", "joined"])
def test_a_smaller_loss_chunk(
    layout: dict[str, Any], model: Path, tmp_path: Path, whole: Any, short: Shortages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nbqlora.train.rungs.LEAST_TOKENS", 32)
    expected = whole(**layout)
    short.when("chunk", lambda hidden: hidden.shape[0] > 32)
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **layout), short)
    plan = found.parts.loaded.plan
    assert plan is not None and plan.loss_chunk_tokens == 32 and set(plan.layer_policies) == {KEEP}
    assert found.shortages[-1].action == plan.decisions[-1].value == "the loss takes 32 tokens at once"
    assert found.same_as(expected)


@pytest.mark.parametrize("place", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_in_parts(layout: str, place: str, model: Path, tmp_path: Path, whole: Any, short: Shortages) -> None:
    options, expected = LAYOUTS[layout], whole(**LAYOUTS[layout])
    short.when(place, at_most(90))
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **options), short)
    assert re.fullmatch(r"micro-batches of more than \d+ tokens run in parts", found.shortages[-1].action)
    plan = found.parts.loaded.plan
    assert plan is not None and plan.decisions[-1].value == found.shortages[-1].action
    assert set(plan.layer_policies) == {ALL}, "it comes after all that changes no bit"
    assert plan.effective_batch_size == found.parts.plan.effective_batch_size
    assert found.near(expected) and not found.same_as(expected)


def test_dropout_does_not_keep_it_from_running_in_parts(
    model: Path, tmp_path: Path, whole: Any, short: Shortages
) -> None:
    options = {**LAYOUTS["joined"], "lora_dropout": 0.1}
    expected = whole(**options)
    short.when("forward", at_most(90))
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **options), short)
    assert found.tokens == expected.tokens and found.losses == pytest.approx(expected.losses, rel=2e-2)


ALONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "effective_batch_size": None}


@pytest.mark.parametrize("place", [pytest.param("forward", marks=pytest.mark.slow), "backward"])
@pytest.mark.parametrize("layout", [{"padding_free": False, **ALONE}, ALONE], ids=["padded", "joined"])
def test_one_long_document_goes_to_tiles(
    layout: dict[str, Any], place: str, model: Path, tmp_path: Path, whole: Any, short: Shortages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("nbqlora.train.rungs.LEAST_TOKENS", 8)
    expected = whole(**layout)
    short.when(place, lambda layer, x: not 0 < layer.scratch.mlp_tile_tokens <= 16)
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **layout), short)
    plan = found.parts.loaded.plan
    assert plan is not None and 8 <= plan.mlp_tile_tokens <= 16
    assert found.shortages[-1].action == f"MLPs take {plan.mlp_tile_tokens} tokens at once"
    assert found.near(expected)


def test_a_pack_whose_one_document_is_too_long(model: Path, tmp_path: Path, whole: Any, short: Shortages,
                                               monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    # First its documents run one by one, then the longest one in tiles.
    monkeypatch.setattr("nbqlora.train.rungs.LEAST_TOKENS", 8)
    expected = whole(**LAYOUTS["packed"])
    short.when("backward", lambda layer, x: x.numel() // 64 > 40 and not 0 < layer.scratch.mlp_tile_tokens <= 16)
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **LAYOUTS["packed"]), short)
    actions = [e.action for e in found.shortages]
    assert actions[-2].endswith("run in parts") and actions[-1].startswith("MLPs take")
    assert found.near(expected)


def test_where_each_micro_batch_is_a_mean_of_its_own(model: Path, tmp_path: Path, short: Shortages) -> None:
    # transformers does so for models whose forward takes no number of tokens.
    outcomes = []
    for name, watch in (("whole", None), ("parts", short)):
        made = parts(model, ROWS, tmp_path / name, max_steps=STEPS, **LAYOUTS["joined"])
        made.trainer.model_accepts_loss_kwargs = False
        short.when("backward", at_most(90))
        outcomes.append(Outcome(made, watch))
    assert outcomes[1].shortages[-1].action.endswith("run in parts") and outcomes[1].near(outcomes[0])
