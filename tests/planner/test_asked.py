"""``gradient_checkpointing`` pinned: which layers that makes, how it is said, and what is wrong with a table."""

from __future__ import annotations

from typing import Any

import pytest

from nbqlora.core.errors import ConfigError
from nbqlora.core.specs import LayerPolicy
from tests.planner.shapes import plan

KEEP, MLP, RECOMPUTE = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
LAYERS = {
    "none": ("none", 32, 0), "false": (False, 32, 0), "full": ("full", 0, 0), "true": (True, 0, 0),
    "both": ({"keep": 22, "recompute": 10}, 22, 0), "keep": ({"keep": 5}, 5, 0),
    "recompute": ({"recompute": 5}, 27, 0), "all": ({"keep": 32}, 32, 0), "no layer": ({"keep": 0}, 0, 0),
    "zero": ({"keep": 32, "recompute": 0}, 32, 0), "MLPs": ({"recompute_mlp": 8}, 24, 8),
    "all MLPs": ({"recompute_mlp": 32}, 0, 32), "keep and MLPs": ({"keep": 10, "recompute_mlp": 8}, 10, 8),
    "recompute and MLPs": ({"recompute": 10, "recompute_mlp": 8}, 14, 8),
    "three": ({"keep": 22, "recompute_mlp": 6, "recompute": 4}, 22, 6),
}  # fmt: skip


@pytest.mark.parametrize("asked,keep,mlp", LAYERS.values(), ids=LAYERS)
def test_pinned_layers_are_kept(asked: Any, keep: int, mlp: int) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    assert found.layer_policies == (RECOMPUTE,) * (32 - keep - mlp) + (MLP,) * mlp + (KEEP,) * keep
    assert {d.name: d.because for d in found.decisions}["layers"] == "pinned by gradient_checkpointing"


@pytest.mark.parametrize("asked,value", [
    ({"keep": 24, "recompute_mlp": 8}, "24 keep · 8 recompute MLP"), ("full", "32 recompute"),
    ({"keep": 22, "recompute_mlp": 6, "recompute": 4}, "22 keep · 6 recompute MLP · 4 recompute"),
])  # fmt: skip
def test_layers_in_words(asked: Any, value: str) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    assert {d.name: d.value for d in found.decisions}["layers"] == value


ONE, TWO, AT_MOST = "one of the two numbers is enough", "two of the three numbers are enough", "at most 32 in all"
WRONG = {
    "too few": ({"keep": 22, "recompute": 4}, "22 keep + 4 recompute = 26", ONE),
    "too many": ({"recompute": 30, "keep": 4}, "30 recompute + 4 keep = 34", ONE),
    "keep": ({"keep": 33}, "33 keep", "at most 32"),
    "recompute": ({"recompute": 40}, "40 recompute", "at most 32"),
    "MLPs": ({"recompute_mlp": 33}, "33 recompute_mlp", "at most 32"),
    "keep and MLPs": ({"keep": 20, "recompute_mlp": 20}, "20 keep + 20 recompute_mlp = 40", AT_MOST),
    "recompute and MLPs": ({"recompute": 3, "recompute_mlp": 30}, "3 recompute + 30 recompute_mlp = 33", AT_MOST),
    "three": ({"keep": 20, "recompute_mlp": 6, "recompute": 4}, "20 keep + 6 recompute_mlp + 4 recompute = 30", TWO),
}


@pytest.mark.parametrize("asked,given,hint", WRONG.values(), ids=WRONG)
def test_layers_that_do_not_add_up(asked: dict[str, int], given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("8B", "H100", gradient_checkpointing=asked)
    (problem,) = caught.value.problems
    assert (problem.key, problem.hint) == ("gradient_checkpointing", hint)
    assert problem.message == f"{given}, but this model has 32 layers"


def test_stock_layers_cannot_recompute_their_mlp_alone() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("stock 8B", "H100", gradient_checkpointing={"keep": 24, "recompute_mlp": 8})
    (problem,) = caught.value.problems
    assert problem.message == "layers of a cohere model recompute all or nothing"
    assert problem.hint == "write recompute in place of recompute_mlp"
    assert (
        plan("stock 8B", "H100", gradient_checkpointing={"keep": 24, "recompute_mlp": 0}).layer_policies[7] is RECOMPUTE
    )
