"""N steps are k steps and N - k steps, to the last bit: figures, evaluations and the adapter's bytes."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

import nbqlora
from nbqlora.core.errors import InterruptedRunError
from nbqlora.core.events import EvalEvent, PhaseEvent, StepEvent
from nbqlora.core.specs import BatchLayout
from nbqlora.engine.packing import PackingProbe
from tests.run.resuming import EPOCH, EVAL, EVERY_STEP, TOTAL, InterruptAfter, figures, finetune, same, until, weights

HOWS: dict[str, dict[str, Any]] = {
    "accumulated": {"per_device_train_batch_size": 1, "eval_data": EVAL},
    "packs": {"packing": True, "padding_free": None, "effective_batch_size": 2},
    "end to end": {"padding_free": None, "optim": "adamw_torch", "lr_scheduler_type": "cosine"},
    "8-bit optimizer": {"optim": "adamw_8bit", "lora_r": 32, "weight_decay": 0.1},
    "noise": {"trl": {"neftune_noise_alpha": 5.0}},
    "by length": {"trl": {"train_sampling_strategy": "group_by_length"}},
    "unseeded sampler": {"trl": {"accelerator_config": {"use_seedable_sampler": False}}},
    "evaluations by steps": {"eval_data": EVAL, "trl": {"eval_strategy": "steps", "eval_steps": 2}},
    "max_steps inside an epoch": {"max_steps": 8, "eval_data": EVAL},
    "workers": {"trl": {"dataloader_num_workers": 1}},
}


pytestmark = pytest.mark.usefixtures("quick")


def every_step(how: dict[str, Any]) -> dict[str, Any]:
    return {**how, **EVERY_STEP, "trl": {**how.get("trl", {}), **EVERY_STEP["trl"]}}


def test_checkpoints_do_not_disturb_the_run(model: Path, tmp_path: Path) -> None:
    how = HOWS["accumulated"]
    silent = finetune(model, tmp_path / "1", **how, save_minutes=0)
    assert same(finetune(model, tmp_path / "2", **every_step(how)), silent)
    assert len(list((tmp_path / "2" / "checkpoints").iterdir())) == TOTAL


# After the first step, at an epoch's end, after it and before the last step; one way of training after all of them.
STEPS = {"accumulated": range(1, TOTAL)}


@pytest.mark.parametrize("name", HOWS)
def test_a_run_goes_on_after_any_step_as_if_nothing_had_been(model: Path, tmp_path: Path, name: str) -> None:
    how = HOWS[name]
    whole = finetune(model, tmp_path / "whole", **every_step(how))
    total = whole.plan.total_steps
    assert len(whole.report.steps) == total >= 8
    for step in STEPS.get(name, (1, EPOCH, EPOCH + 1, total - 1)):
        out = until(step, tmp_path / "whole", tmp_path / str(step))
        told: list[Any] = []
        run = finetune(model, out, **how, resume=True, observe=told.append)
        assert [e.step for e in told if isinstance(e, StepEvent)] == list(range(step + 1, total + 1))
        assert same(run, whole), f"after step {step}"


@pytest.fixture(scope="module")
def evaluated(quick: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> nbqlora.Run:
    """Nine steps with three evaluations, dropout and accumulation, in one go."""
    return finetune(model, tmp_path_factory.mktemp("evaluated"), **HOWS["accumulated"], save_minutes=0)


@pytest.mark.parametrize("step", [1, EPOCH, EPOCH + 1])
def test_a_stopped_run_goes_on_as_if_nothing_had_been(
    model: Path, tmp_path: Path, evaluated: nbqlora.Run, step: int
) -> None:
    stopped = finetune(model, tmp_path, **HOWS["accumulated"], save_minutes=0, observe=InterruptAfter(step))
    # At an epoch's end the run stops there, before the evaluation; elsewhere the next step was on its way.
    last = step if step == EPOCH else step + 1
    assert stopped.status == "stopped" and [e.step for e in stopped.report.steps] == list(range(1, last + 1))
    assert {e.step for e in stopped.report.evals} == ({0} if step <= EPOCH else {0, EPOCH})
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [f"step-{last:06d}"]
    run = stopped.resume()
    assert run.status == "done" and run.report.reason == "" and same(run, evaluated)
    assert stopped.status == "stopped" and len(stopped.report.steps) == last, "the former run changed"


def test_a_run_that_max_minutes_ends_every_time_gets_there_step_by_step(
    model: Path, tmp_path: Path, evaluated: nbqlora.Run
) -> None:
    for step in range(1, TOTAL + 1):
        run = finetune(model, tmp_path, **HOWS["accumulated"], max_minutes=1e-9, resume=True)
        assert (len(run.report.steps), run.status) == (step, "done" if step == TOTAL else "stopped")
    # The last step of a run that should stop is its end, without the evaluation.
    assert figures(run)[:TOTAL] == figures(evaluated)[:TOTAL]
    assert weights(run.adapter_dir) == weights(evaluated.adapter_dir)


def test_a_run_interrupted_twice_goes_on_from_its_last_checkpoint(
    model: Path, tmp_path: Path, evaluated: nbqlora.Run
) -> None:
    class Twice(InterruptAfter):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if isinstance(event, PhaseEvent) and event.phase == "stop":
                os.kill(os.getpid(), signal.SIGINT)

    message = r"interrupted in the middle of a step; .*\n  call it with resume=True to go on after step 4 of 9$"
    with pytest.raises(InterruptedRunError, match=message):
        finetune(model, tmp_path, **every_step(HOWS["accumulated"]), observe=Twice(5))
    assert same(finetune(model, tmp_path, **HOWS["accumulated"], resume=True), evaluated)


def test_a_finished_run_trains_nothing_and_is_given_back(model: Path, tmp_path: Path, evaluated: nbqlora.Run) -> None:
    shutil.copytree(evaluated.adapter_dir.parent / "checkpoints", tmp_path / "checkpoints")
    told: list[Any] = []
    run = finetune(model, tmp_path, **HOWS["accumulated"], resume=True, observe=told.append)
    assert not any(isinstance(e, StepEvent | EvalEvent) for e in told)
    assert [e.phase for e in told if isinstance(e, PhaseEvent)] == ["look", "load", "save"]
    assert run.status == "done" and same(run, evaluated)
    assert run.report.measured_peak_bytes == max(e.peak_bytes for e in run.report.steps)
    assert run.chat("sun", max_new_tokens=4) == evaluated.chat("sun", max_new_tokens=4)


def test_the_clock_goes_on_and_the_pause_does_not_count(model: Path, tmp_path: Path) -> None:
    first = finetune(model, tmp_path, observe=InterruptAfter(2))
    last = first.events[-1].elapsed_seconds
    second = first.resume()
    times = [e.elapsed_seconds for e in second.events]
    assert times == sorted(times) and second.report.seconds > last
    saved = max(e.elapsed_seconds for e in second.events if isinstance(e, StepEvent) and e.step <= 3)
    assert saved == first.report.steps[-1].elapsed_seconds
    # The first step of each part holds warm-up.
    counted = [e for e in second.report.steps if e.step not in (1, 4)]
    rate = sum(e.n_tokens for e in counted) / sum(e.seconds for e in counted)
    assert second.report.tokens_per_second == pytest.approx(rate)


def test_a_layout_that_was_changed_after_loading_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {"packing": "auto", "padding_free": None}
    leaks = PackingProbe(exact=False, because="documents mix")
    with monkeypatch.context() as patch:
        patch.setattr("nbqlora.run.job.probe_loaded", lambda loaded, rows: leaks)
        whole = finetune(model, tmp_path / "whole", **free, **EVERY_STEP)
    assert whole.plan.data.layout is BatchLayout.PADDED
    out = until(4, tmp_path / "whole", tmp_path / "4")
    assert same(finetune(model, out, **free, resume=True), whole)
