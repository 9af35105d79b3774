"""Out of memory around the micro-batches: in the optimizer, in evaluations, and in other words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from nbqlora.core.specs import LayerPolicy
from tests import tiny
from tests.train.parts import parts
from tests.train.shortages import (
    EACH_LAYOUT,
    LAYOUTS,
    ROWS,
    STEPS,
    Outcome,
    Shortages,
    in_optimizer,
    model,
    short,
    shortages,
    whole,
)

__all__ = ["model", "short", "whole"]  # fixtures
JOINED = LAYOUTS["joined"]
OTHERS = tiny.make_rows(20, seed=1)


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "error",
    [
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError,
    ],
    ids=["cublas", "cpu", "memory-error"],
)  # fmt: skip
def test_other_words_for_it(error: Any, model: Path, tmp_path: Path, whole: Any, short: Shortages) -> None:
    expected = whole(**JOINED)
    short.at("backward", 4)
    short.error = error
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **JOINED), short)
    assert found.same_as(expected) and len(found.shortages) == 1


def test_another_error_is_raised_at_once(model: Path, tmp_path: Path, short: Shortages) -> None:
    made = parts(model, ROWS, tmp_path, max_steps=STEPS)
    short.at("backward", 2)
    short.error = lambda: RuntimeError("shape '[3]' is invalid for input of size 4")
    with pytest.raises(RuntimeError, match=r"^shape "):
        Outcome(made, short)
    assert short.failed == ["backward"] and shortages(made.events) == []


@pytest.mark.parametrize("optim", ["adamw_8bit", *(slow(o) for o in ("adamw_torch_fused", "adamw_torch"))])
def test_as_the_optimizer_begins(optim: str, model: Path, tmp_path: Path, whole: Any) -> None:
    options = {**JOINED, "optim": optim}
    expected = whole(**options)
    made = parts(model, ROWS, tmp_path, max_steps=STEPS, **options)
    with in_optimizer(1, 4) as calls:
        found = Outcome(made)
    assert found.same_as(expected)
    assert len(calls) == STEPS + 2
    assert [(e.step, e.phase, e.action) for e in found.shortages] == [
        (1, "optimizer", "unused memory was given back"), (3, "optimizer", "unused memory was given back"),
    ]  # fmt: skip


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adamw_8bit"])
@pytest.mark.parametrize("flat", [True, False])
def test_its_states_are_there_before_the_first_step(optim: str, flat: bool, model: Path, tmp_path: Path) -> None:
    # An adapter on the embedding is in no buffer.
    more = {} if flat else {"target_modules": ["q_proj", "model.embed_tokens"]}
    made = parts(model, ROWS, tmp_path, max_steps=1, optim=optim, **more)
    seen: list[dict[str, Any]] = []

    def look(*_: Any) -> None:
        optimizer = made.trainer.optimizer.optimizer
        stepped = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(optimizer.state) == len(stepped) > 0
        seen.append({k: v.clone() for p in stepped for k, v in optimizer.state[p].items() if torch.is_tensor(v)})

    handle = register_optimizer_step_pre_hook(look)
    made.trainer.train()
    handle.remove()
    assert len(seen) == 1
    assert all(not t.any() for k, t in seen[0].items() if "qmap" not in k), "they are those of no step"


@pytest.mark.parametrize("call", [5, slow(1), slow(35)])
@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_once_in_an_evaluation(
    layout: str, call: int, model: Path, tmp_path: Path, whole: Any, short: Shortages
) -> None:
    every_two = {"eval_strategy": "steps", "eval_steps": 2}
    options = {"eval_data": OTHERS, **LAYOUTS[layout], "trl": every_two}
    expected = whole(**options)
    short.at("eval", call)
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **options), short)
    assert short.failed == ["eval"] and found.same_as(expected) and len(found.evals) >= 2
    (event,) = found.shortages
    assert (event.phase, event.action) == ("eval", "unused memory was given back")
    assert event.step == (0 if call < 35 else 2)


@pytest.mark.parametrize("layout", EACH_LAYOUT)
def test_an_evaluation_in_parts(layout: str, model: Path, tmp_path: Path, whole: Any, short: Shortages) -> None:
    options = {"eval_data": OTHERS, **LAYOUTS[layout]}
    expected = whole(**options)
    short.when("eval", lambda layer, x: x.numel() // x.shape[-1] > 90)
    found = Outcome(parts(model, ROWS, tmp_path, max_steps=STEPS, **options), short)
    assert found.losses == expected.losses and found.evals == pytest.approx(expected.evals, rel=1e-6)
    assert re.fullmatch(r"evaluation takes no more than \d+ tokens at once", found.shortages[-1].action)
    assert {e.phase for e in found.shortages} == {"eval"} and {e.step for e in found.shortages} == {0}
    assert found.parts.loaded.plan is not None and set(found.parts.loaded.plan.layer_policies) == {LayerPolicy.KEEP}


@pytest.mark.parametrize("place", ["backward", "optimizer"])
def test_the_loss_scale_is_left_alone(place: str, model: Path, tmp_path: Path, short: Shortages) -> None:
    outcomes, scalers = [], []
    for name in ("whole", "short"):
        made = parts(model, ROWS, tmp_path / name, max_steps=STEPS, max_grad_norm=0.0, **JOINED)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        made.trainer.accelerator.scaler = scaler
        scalers.append(scaler)
        fails, short.calls = name == "short", dict.fromkeys(short.calls, 0)
        short.at("backward", *([4] if fails and place == "backward" else []))
        with in_optimizer(*([2] if fails and place == "optimizer" else [])):
            outcomes.append(Outcome(made, short))
    assert outcomes[1].same_as(outcomes[0]) and len(outcomes[1].shortages) == 1
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert scalers[0].get_scale() == 128.0, "it grew once in three steps"
