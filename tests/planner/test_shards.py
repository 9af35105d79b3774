"""A model larger than a card: when its weights are split over several, and what is said where they are not."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from nbqlora.core.errors import ConfigError
from nbqlora.core.specs import DeviceSpec
from nbqlora.planner import make_plan
from nbqlora.planner.cards import Cards
from tests.planner.several import MODEL, PAIR_24, PAIR_80, T4S, plan, refused
from tests.planner.shapes import GIB, options, rows_of

# What is asked for, and what stands against it.


def test_whole_where_that_fits_else_split() -> None:
    assert plan("14B", T4S).shards == 1
    found = plan("32B", T4S, optim="adamw_8bit")
    assert (found.shards, found.n_cards) == (2, 2)
    assert plan("14B", T4S, fsdp=True).shards == 2
    assert plan("70B", PAIR_80, cards=Cards(per_node=2, n_nodes=2), fsdp=True).shards == 4


def test_false_is_never_split_and_says_what_would_be() -> None:
    lines = refused("32B", T4S, optim="adamw_8bit", fsdp=False)
    assert lines[0] == "32B needs 19.9 GiB and Tesla T4 has 13.7 GiB usable"
    assert lines[2:] == ["it fits when you leave out fsdp", "fsdp = false keeps the whole model on each card"]


@pytest.mark.parametrize(
    ("model", "changes", "key", "message", "hint"),
    [
        ("8B", {"gpus": None}, "fsdp", "one card trains, so there is none to share the weights with",
         'write gpus = 2, or "all"; or leave fsdp out'),
        ("8B", {"gpus": 1}, "fsdp", "one card trains, so there is none to share the weights with",
         'write gpus = 2, or "all"; or leave fsdp out'),
        ("8B", {"load_in_4bit": False}, "fsdp",
         "only NF4 weights are split, and load_in_4bit = false keeps them in full size", "write load_in_4bit = true"),
        ("stock 8B", {}, "fsdp",
         "only fused layers are split, and those of a cohere model stay transformers' own",
         "leave fsdp out: each card then has the whole model"),
        ("8B", {"peft": {"use_dora": True}}, "fsdp",
         "only fused layers are split, and these settings of [peft] leave them transformers' own",
         "leave fsdp out: each card then has the whole model"),
        ("8B", {"gradient_checkpointing": {"recompute": 30, "join": 2}}, "gradient_checkpointing",
         "a layer that joins would need the weights of those before it too, so none joins where they are split",
         "write recompute or offload in place of join"),
    ],
)  # fmt: skip
def test_true_where_weights_cannot_be_split(
    model: str, changes: dict[str, Any], key: str, message: str, hint: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        plan(model, PAIR_80, fsdp=True, **changes)
    (problem,) = caught.value.problems
    assert (problem.key, problem.message, problem.hint) == (key, message, hint)


def test_a_checkpoint_in_nf4_is_split_whatever_load_in_4bit_says() -> None:
    stored = replace(MODEL["8B"], quantized=True)
    config = options(gpus=2, fsdp=True, load_in_4bit=False)
    assert make_plan(config, stored, T4S, rows_of(), output_dir="r").shards == 2


def test_what_keeps_a_model_whole_is_said_where_it_does_not_fit() -> None:
    small = replace(PAIR_24, free_bytes=6 * GIB)
    whole = "each card needs the whole model here: "
    assert refused("stock 8B", small)[-1] == (
        f"{whole}only fused layers are split, and those of a cohere model stay transformers' own"
    )
    joined = refused("8B", small, gradient_checkpointing={"recompute": 30, "join": 2})
    assert joined[2] == 'it fits when you write gradient_checkpointing = "auto"'
    assert joined[3].startswith(f"{whole}a layer that joins")
    assert plan("8B", small).shards == 2
    assert refused("8B", small, load_in_4bit=False)[2] == "it fits when you write load_in_4bit = true"


# One card asked for, or too few.


def test_one_card_that_does_not_do_names_what_two_would() -> None:
    split = "gpus = 2 splits the weights over both"
    assert refused("32B", T4S, gpus=1, optim="adamw_8bit")[-1] == f"{split}: it fits with max_length = 1024"
    shorter = refused("32B", T4S, gpus=1)[-1]
    assert shorter.startswith(f"{split}: it fits with max_length = ")
    tokens = int(shorter.split()[-1])
    assert plan("32B", T4S, tokens=tokens, per_device_train_batch_size=1).shards == 2
    refused("32B", T4S, tokens=tokens + 64, per_device_train_batch_size=1)
    assert refused("70B", T4S, gpus=1)[-1] == f"{split}, and 25.8 GiB would be needed on each"
    four = replace(T4S, n_devices=4)
    assert (
        refused("32B", four, gpus=None)[-1]
        == "gpus = 3 splits the weights over 3 of them: it fits with max_length = 1024"
    )
    plan("32B", four, gpus=3)


def test_one_card_of_several_that_could_not_share() -> None:
    small = replace(PAIR_24, free_bytes=4 * GIB)
    assert refused("stock 8B", small, gpus=1)[-1] == (
        "gpus = 2 would not do: only fused layers are split, and those of a cohere model stay transformers' own"
    )


def test_too_few_cards_name_a_smaller_adapter_and_more_cards() -> None:
    lines = refused("32B", T4S)
    assert lines[0] == "32B needs 13.8 GiB, split over 2 cards, and Tesla T4 has 13.7 GiB usable"
    assert lines[-1] == 'it would fit with optim = "adamw_8bit", or split over 3 such cards'
    plan("32B", T4S, optim="adamw_8bit")
    plan("32B", T4S, gpus=3)
    words = refused("70B", T4S)[-1]
    assert words.startswith("it would fit split over ") and words.endswith(" such cards")
    n = int(words.split()[-3])
    assert plan("70B", T4S, gpus=n).shards == n > 2
    refused("70B", T4S, gpus=n - 1)
    few = 'with optim = "adamw_8bit" and target_modules = ["q_proj", "v_proj"]'
    assert refused("70B", PAIR_24)[-1] == f"it would fit {few}, or split over 3 such cards"
    nothing = replace(T4S, free_bytes=3 * GIB)
    assert refused("70B", nothing)[-1] == "no number of such cards would do, up to 64 cards"
    assert "would do" not in refused("70B", nothing, gpus=64)[-1], "nothing was looked at"


def test_a_batch_that_some_numbers_of_cards_do_not_make() -> None:
    batch = {"effective_batch_size": 16, "per_device_train_batch_size": 4}
    little = replace(T4S, host_free_bytes=6 * GIB)
    # Three make no steps of 16, five and more no micro-batch of 4.
    assert refused("32B", little, **batch)[-1] == "it would fit split over 4 such cards"
    plan("32B", little, gpus=4, **batch)


def test_processes_of_a_cpu_share_its_memory() -> None:
    cpu = replace(T4S, kind="cpu", name="a CPU", n_devices=1, capability=None, free_bytes=4 * GIB)
    said = refused("8B", cpu, gpus=3)[-1]
    assert said == "3 processes share the machine's memory: fewer would have more of it each"


def test_several_machines_that_are_too_few_name_more_machines() -> None:
    def on(n_nodes: int) -> Cards:
        return Cards(per_node=2, n_nodes=n_nodes)

    words = refused("70B", T4S, cards=on(1))[-1]
    assert words.endswith(" such cards")
    words = refused("70B", T4S, cards=on(2))[-1]
    assert words.startswith("it would fit split over ") and words.endswith(" such machines")
    n = int(words.split()[-3])
    assert plan("70B", T4S, cards=on(n)).shards == 2 * n > 4
    refused("70B", T4S, cards=on(n - 1))
    # What the machines have comes first.
    four, one_each = replace(T4S, n_devices=4), Cards(n_nodes=2)
    assert refused("32B", four, cards=one_each)[-1].endswith("or with gpus = 2")
    plan("32B", four, cards=Cards(per_node=2, n_nodes=2))


# Honest answers, from shapes alone.


@pytest.mark.parametrize(
    ("model", "device", "changes", "n"),
    [
        ("70B", PAIR_80, {"tokens": 2048}, 1),
        ("70B", PAIR_24, {}, None),
        ("70B", PAIR_24, {"gpus": 3}, 3),
        ("70B", PAIR_24, {"optim": "adamw_8bit", "target_modules": ("q_proj", "v_proj")}, 2),
        ("32B", T4S, {}, None),
        ("32B", T4S, {"optim": "adamw_8bit"}, 2),
        ("14B", T4S, {}, 1),
        ("70B", T4S, {}, None),
    ],
)
def test_what_trains_where(model: str, device: DeviceSpec, changes: dict[str, Any], n: int | None) -> None:
    begun = time.perf_counter()
    if n is None:
        assert "split over" in refused(model, device, **changes)[-1]
    else:
        found = plan(model, device, **changes)
        assert found.shards == n and found.predicted_peak_bytes <= found.usable_bytes
    assert time.perf_counter() - begun < 1
