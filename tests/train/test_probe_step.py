"""The longest micro-batch before step 1 leaves no trace in the training; what it finds corrects the plan."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from nbqlora.core.errors import MemoryExhaustedError, NonFiniteLossError
from nbqlora.core.plan import Probed
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Layer
from nbqlora.memory.profile import Profile
from nbqlora.planner.probed import corrected, in_words
from nbqlora.train.probe_step import longest
from nbqlora.train.state import random_state
from tests import tiny
from tests.train.parts import Parts, parts
from tests.train.probing import Measured, add_probe, probed
from tests.train.shortages import LAYOUTS, ROWS, STEPS, Outcome, Shortages, model, short, whole

__all__ = ["model", "short", "whole"]  # fixtures
JOINED = {**LAYOUTS["joined"], "lora_dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "padded": {**LAYOUTS["padded"], "lora_dropout": 0.1},
    "joined, 8 bits": {**JOINED, "optim": "adamw_8bit"},
    "packed, plain": {**LAYOUTS["packed"], "lora_dropout": 0.1, "optim": "adamw_torch"},
    "evaluated": {**JOINED, "eval_data": tiny.make_rows(5, seed=1)},
    "offloaded": {**JOINED, "gradient_checkpointing": {"offload": 2, "join": 1}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_run_to_the_last_bit(case: str, model: Path, tmp_path: Path, whole: Any) -> None:
    expected = whole(**CASES[case])
    made, told = probed(model, ROWS, tmp_path, max_steps=STEPS, **CASES[case])
    found = Outcome(made)
    assert found.same_as(expected) and len(told) == 1
    assert len(set(found.losses)) == STEPS


class State(TrainerCallback):
    """Everything that the training goes on from, taken as a callback of the beginning."""

    def __init__(self, made: Parts) -> None:
        self.made, self.found = made, {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        trainer = self.made.trainer
        optimizer, adapters = trainer.optimizer.optimizer, engine_of(self.made.loaded.model).scratch.adapters
        states = [v for of in optimizer.state.values() for v in of.values() if torch.is_tensor(v)]
        self.found = {
            **{f"random {k}": v for k, v in random_state().items()},
            **{f"optimizer {i}": v.clone() for i, v in enumerate(states)},
            **{name: p.detach().clone() for name, p in tiny.lora_parameters(self.made.loaded.model).items()},
            "gradient": adapters.all_gradients().clone(),
            "scaler": trainer.accelerator.scaler.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "grads": [p.grad for p in self.made.loaded.trainable()],
            "hooks": len(optimizer._optimizer_step_pre_hooks),
        }


def with_scaler(made: Parts) -> Parts:
    made.trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    return made


def test_nothing_is_moved(model: Path, tmp_path: Path) -> None:
    made = with_scaler(parts(model, ROWS, tmp_path, max_steps=1, **JOINED))
    told: list[str] = []
    before, after = State(made), State(made)
    made.trainer.add_callback(before)
    add_probe(made, told)
    made.trainer.add_callback(after)
    random.seed(7)
    np.random.seed(7)
    made.trainer.train()
    assert told and before.found.keys() == after.found.keys()
    for name, value in before.found.items():
        same = torch.equal(value, after.found[name]) if torch.is_tensor(value) else value == after.found[name]
        assert same, name
    assert set(after.found["grads"]) == {None} and not after.found["gradient"].any()


def test_a_loss_scale_is_where_it_would_be(model: Path, tmp_path: Path) -> None:
    outcomes, scales = [], []
    for name in ("without", "with"):
        made = with_scaler(parts(model, ROWS, tmp_path / name, max_steps=STEPS, **JOINED))
        if name == "with":
            add_probe(made, [])
        outcomes.append(Outcome(made))
        scales.append(made.trainer.accelerator.scaler)
    assert outcomes[1].same_as(outcomes[0])
    assert scales[0].state_dict() == scales[1].state_dict() != {}
    assert scales[0].get_scale() > 2.0**10, "it has grown"


def test_layers_of_transformers_own_and_a_mean_of_each_micro_batch(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "cohere", "cohere", initializer_range=0.2)
    outcomes = []
    for name in ("without", "with"):
        made = parts(folder, ROWS, tmp_path / name, max_steps=2, **{**JOINED, "padding_free": False})
        made.trainer.model_accepts_loss_kwargs = False
        if name == "with":
            add_probe(made, [])
        outcomes.append(Outcome(made))
    assert engine_of(outcomes[0].parts.loaded.model) is None
    assert outcomes[1].same_as(outcomes[0])


def keeps(layer: Layer, x: torch.Tensor) -> bool:
    return layer.policy is LayerPolicy.KEEP


@pytest.mark.parametrize("place", ["forward", "backward"])
def test_memory_that_runs_out_in_it_lowers_the_run_before_its_first_step(
    place: str, model: Path, tmp_path: Path, whole: Any, short: Shortages
) -> None:
    expected = whole(**JOINED)
    short.when(place, keeps)
    made, told = probed(model, ROWS, tmp_path, max_steps=STEPS, **JOINED)
    found = Outcome(made, short)
    assert found.same_as(expected), "no row of it is lost or counted twice"
    assert [(e.step, e.phase) for e in found.shortages] == [(1, "probe")] * 2
    assert [e.action for e in found.shortages] == [
        "unused memory was given back", "3 more layers compute their MLP again in the backward"
    ]  # fmt: skip
    assert made.loaded.plan.layer_policies == (LayerPolicy.RECOMPUTE_MLP,) * 3 and len(told) == 1


def test_nothing_fits(model: Path, tmp_path: Path, short: Shortages) -> None:
    short.when("forward", lambda layer, x: True)
    made, told = probed(model, ROWS, tmp_path, max_steps=STEPS, **JOINED)
    with pytest.raises(MemoryExhaustedError, match="with nothing left to lower"):
        Outcome(made, short)
    assert told == [] and made.losses == [] and all(p.grad is None for p in made.loaded.trainable())


def above(made: Parts, n_bytes: int) -> int:
    return made.plan.usable_bytes + n_bytes


def test_a_peak_above_the_limit_is_lowered_until_it_is_not(model: Path, tmp_path: Path, whole: Any) -> None:
    measured = Measured()
    made, told = probed(model, ROWS, tmp_path, measured, max_steps=STEPS, **JOINED)
    measured.peaks += [above(made, 1 << 20), above(made, 1 << 10), made.plan.usable_bytes]
    found = Outcome(made)
    assert found.same_as(whole(**JOINED)) and measured.phases == ["probe"] * 3
    assert [(e.step, e.phase, e.asked_bytes) for e in found.shortages] == [(1, "probe", 1 << 20), (1, "probe", 1 << 10)]
    lowered = [d for d in made.loaded.plan.decisions if d.name == "lowered"]
    assert [d.value for d in lowered] == [e.action for e in found.shortages]
    assert lowered[0].because == "the probe took 1 MiB more than there may be"
    assert made.loaded.plan.probed.peak_bytes == made.plan.usable_bytes and "0 MiB of" in told[0]


def test_with_nothing_left_to_lower_it_is_said_and_the_run_goes_on(model: Path, tmp_path: Path) -> None:
    measured = Measured()
    how = {"gradient_checkpointing": "full", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2,
           "effective_batch_size": None, "lora_dropout": 0.1}  # fmt: skip
    made, told = probed(model, ROWS, tmp_path, measured, max_steps=2, **how)
    measured.peaks += [above(made, 3 << 20)] * 9
    made.trainer.train()
    assert len(made.losses) == 2
    assert f", 3 MiB above {told[0].split(' above ')[1].split(';')[0]}; " in told[0]


def test_rows_without_a_finite_loss_are_found_by_the_step_that_learns_them(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "model", bad_token="Z")
    rows = tiny.make_rows(12)
    rows[4]["messages"][1]["content"] += " river stone" * 4 + " Z"  # the longest
    errors = []
    for name in ("without", "with"):
        made = parts(folder, rows, tmp_path / name, **{**JOINED, "num_train_epochs": 1})
        told: list[str] = []
        if name == "with":
            add_probe(made, told)
        with pytest.raises(NonFiniteLossError) as caught:
            made.trainer.train()
        errors.append((str(caught.value), made.losses))
    assert told and errors[0] == errors[1] and "on the data's rows 5;" in errors[0][0]


@pytest.fixture(scope="module")
def planned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    return parts(model, ROWS, tmp_path_factory.mktemp("planned"), **LAYOUTS["joined"])


def test_the_plan_is_corrected(planned: Parts) -> None:
    plan = replace(planned.plan, usable_bytes=14 << 30)
    found = Probed(tokens=200, peak_bytes=13 << 30, seconds=0.5, total_seconds=2.0)
    after = corrected(plan, found)
    rows = 2 * plan.data.n_tokens / plan.data.n_sequences
    assert after.step_seconds == pytest.approx(0.5 * rows / 200 * 2) and after.probed is found
    linked = replace(plan, device=replace(plan.device, link_bytes_per_second=1e9), n_cards=2, sent_bytes=3 * 10**8)
    assert corrected(linked, found).step_seconds == pytest.approx(0.5 * rows / 200 * 2 + 0.3)
    assert after.predicted_peak_bytes == plan.predicted_peak_bytes, "what was predicted stays"
    (row,) = [d for d in after.decisions if d.name == "probe"]
    assert (row.value, row.because) == (
        "13.0 GiB, 0.5 s",
        "measured before the first step, on the longest micro-batch: 200 tokens; 1.0 GiB of 14.0 GiB left",
    )  # fmt: skip
    assert in_words(after, found).startswith("corrected after the probe: peak 13.0 GiB, planned ")
    assert in_words(after, found).endswith("1.0 GiB of 14.0 GiB left; under 1 min of training; it took 2.0 s")
    (before,) = [d for d in plan.decisions if d.name == "probe"]
    assert (before.value, before.because) == ("none", "on a CPU it takes as long as a step, and the first step tells")


@pytest.mark.parametrize("n", [1, 3, 10, 30])
def test_the_longest_rows_and_of_those_the_most_learned(n: int) -> None:
    from datasets import Dataset

    numbers = np.random.default_rng(0)
    rows = [
        {"input_ids": list(range(size)), "labels": [-100 if x < 0.5 else 1 for x in numbers.random(size)]}
        for size in numbers.integers(1, 9, 50)
    ]
    whole_set = Dataset.from_list(rows)
    for data in (whole_set, whole_set.select(range(10, 40)), whole_set.shuffle(seed=1)):
        sizes = [(len(r["input_ids"]), sum(x != -100 for x in r["labels"])) for r in data]
        assert sorted(sizes[i] for i in longest(data, n)) == sorted(sizes)[-n:]


def test_it_is_a_phase_of_its_own_that_a_view_may_look_at() -> None:
    profile = Profile("cpu")
    with profile:

        def work() -> None:
            profile.enter("forward")
            held = torch.ones(64 << 18)  # 64 MiB
            profile.snapshot()
            del held

        peak = profile.measured("probe", work)
        assert profile.phase == "load"
        profile.enter("forward")
    phases = {p.phase: p.peak_bytes for p in profile.snapshot().phases}
    assert [*phases] == ["load", "probe", "forward"] and phases["probe"] == peak > phases["load"]
    assert profile.measured("probe", lambda: None) == 0, "outside a stretch"
