"""``gradient_checkpointing`` pinned: which layers that makes, how it is said, and what is wrong with a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nbqlora.core.errors import ConfigError
from nbqlora.core.specs import LayerPolicy
from nbqlora.planner import make_plan
from nbqlora.planner.mix import spread
from tests.planner.shapes import DEVICES, GIB, MODELS, options, plan, rows_of

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
# First to last: heads that offload and those that recompute, each with the layers that join it; then as they keep more.
OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN
GROUPS = {
    "offload": ("offload", [OFFLOAD] * 32),
    "some": ({"offload": 5}, [OFFLOAD] * 5 + [KEEP] * 27),
    "all there is": ({"keep": 8, "recompute_mlp": 6, "recompute": 2, "offload": 4, "join": 12},
                     [OFFLOAD, JOIN, JOIN, JOIN] * 4 + [RECOMPUTE] * 2 + [MLP] * 6 + [KEEP] * 8),
    "levelled": ({"recompute": 4, "join": 20, "keep": 8},
                 [p for n in (8, 7, 6, 3) for p in (RECOMPUTE, *[JOIN] * (n - 1))] + [KEEP] * 8),
    "even": ({"offload": 8, "join": 24}, [OFFLOAD, JOIN, JOIN, JOIN] * 8),
    "rest recomputes": ({"keep": 0, "join": 24}, None),
}  # fmt: skip


@pytest.mark.parametrize("asked,keep,mlp", LAYERS.values(), ids=LAYERS)
def test_pinned_layers_are_kept(asked: Any, keep: int, mlp: int) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    assert found.layer_policies == (RECOMPUTE,) * (32 - keep - mlp) + (MLP,) * mlp + (KEEP,) * keep
    assert {d.name: d.because for d in found.decisions}["layers"] == "pinned by gradient_checkpointing"


@pytest.mark.parametrize("asked,value", [
    ({"keep": 24, "recompute_mlp": 8}, "24 keep · 8 recompute MLP"), ("full", "32 recompute"),
    ({"keep": 22, "recompute_mlp": 6, "recompute": 4}, "22 keep · 6 recompute MLP · 4 recompute"),
    ({"offload": 6, "join": 20, "recompute": 6}, "6 recompute · 6 offload · 20 join"),
])  # fmt: skip
def test_layers_in_words(asked: Any, value: str) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    assert {d.name: d.value for d in found.decisions}["layers"] == value


@pytest.mark.parametrize("asked,expected", GROUPS.values(), ids=GROUPS)
def test_layers_that_offload_and_join(asked: Any, expected: list[LayerPolicy] | None) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    if expected is None:
        assert found.layer_policies.count(JOIN) == 24 and found.layer_policies.count(RECOMPUTE) == 8
        assert found.layer_policies[0] is RECOMPUTE and found.layer_policies[-1] is not KEEP
    else:
        assert list(found.layer_policies) == expected
    x = 4096 * 2 * 1024 * found.micro_batch_size
    assert found.host_bytes == found.layer_policies.count(OFFLOAD) * x


COUNTS = [(0, 4, 8), (3, 0, 10), (2, 5, 9), (1, 1, 30), (8, 8, 1), (0, 12, 20)]


@pytest.mark.parametrize("offload,recompute,join", COUNTS)
def test_groups_hold_the_fewest_inputs_at_once(offload: int, recompute: int, join: int) -> None:
    before = [0] * offload + list(range(recompute))
    found = spread(offload, recompute, join)
    assert sum(found) == offload + recompute + join and min(found) >= 1
    most = max(n + size for n, size in zip(before, found, strict=True))
    # With one input less at once the last head has no room for its own, or the others not for all that join.
    assert most - 1 < before[-1] + 1 or sum(max(0, most - 1 - n - 1) for n in before) < join


def test_nothing_to_join() -> None:
    with pytest.raises(ValueError, match="need one before them that keeps its input"):
        spread(0, 0, 3)


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
    "offload": ({"offload": 33}, "33 offload", "at most 32"),
    "four": (
        {"keep": 20, "offload": 6, "join": 3, "recompute": 4},
        "20 keep + 6 offload + 3 join + 4 recompute = 33",
        "three of the four numbers are enough",
    ),
}


@pytest.mark.parametrize("asked,given,hint", WRONG.values(), ids=WRONG)
def test_layers_that_do_not_add_up(asked: dict[str, int], given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("8B", "H100", gradient_checkpointing=asked)
    (problem,) = caught.value.problems
    assert (problem.key, problem.hint) == ("gradient_checkpointing", hint)
    assert problem.message == f"{given}, but this model has 32 layers"


def problem(asked: dict[str, int], model: str) -> tuple[str, str, str]:
    with pytest.raises(ConfigError) as caught:
        plan(model, "H100", gradient_checkpointing=asked)
    (found,) = caught.value.problems
    return found.key, found.message, found.hint


def test_stock_layers_recompute_their_mlp_and_offload_but_do_not_join() -> None:
    found = plan("stock 8B", "H100", gradient_checkpointing={"keep": 20, "recompute_mlp": 8, "offload": 4})
    assert found.layer_policies == (OFFLOAD,) * 4 + (MLP,) * 8 + (KEEP,) * 20
    assert problem({"recompute": 8, "join": 24}, "stock 8B") == (
        "gradient_checkpointing",
        "layers of a cohere model cannot join: each needs an input of its own",
        "write recompute or offload in place of join",
    )


def test_layers_that_join_need_others() -> None:
    for asked in ({"join": 24}, {"join": 20, "recompute_mlp": 12}):
        assert problem(asked, "8B") == (
            "gradient_checkpointing",
            f"{asked['join']} layers have none to join: nothing before them recomputes or offloads",
            "write recompute or offload beside join; its layers are shared out among those",
        )


def test_layers_without_an_mlp_recompute_all_or_nothing() -> None:
    spec = replace(MODELS["stock 8B"], architecture="mamba", mlp_alone=False)
    with pytest.raises(ConfigError) as caught:
        make_plan(
            options(gradient_checkpointing={"recompute_mlp": 8}), spec, DEVICES["H100"], rows_of(), output_dir="out"
        )
    (found,) = caught.value.problems
    assert found.message == "layers of a mamba model have no MLP that could be computed again alone"
    tight = replace(DEVICES["H100"], free_bytes=12 * GIB)
    planned = make_plan(options(), spec, tight, rows_of(), output_dir="out")
    assert MLP not in planned.layer_policies and KEEP in planned.layer_policies
