"""Interrupts at awkward moments: in the optimizer's step, in an evaluation, while saving, before training."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import InterruptedRunError
from nbqlora.core.events import EvalEvent, NoteEvent, PhaseEvent, StepEvent, StoppedEvent
from nbqlora.train.stop import INTERRUPTED
from tests import tiny
from tests.train.interrupts import ROWS, handler, interrupt
from tests.train.parts import finetune

__all__ = ["handler"]  # autouse
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


class Events:
    """Keeps events, and interrupts at a phase as often as asked."""

    def __init__(self, phase: str = "", times: int = 1) -> None:
        self.phase, self.times = phase, times
        self.all: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.all.append(event)
        if isinstance(event, PhaseEvent) and event.phase == self.phase:
            for _ in range(self.times):
                interrupt()

    def phases(self) -> list[str]:
        return [e.phase for e in self.all if isinstance(e, PhaseEvent)]

    def steps(self, kind: type) -> list[int]:
        return [e.step for e in self.all if isinstance(e, kind)]


@contextmanager
def in_optimizer(act: Callable[[], None], step: int) -> Iterator[None]:
    """Act as the optimizer begins a step."""
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    count = 0

    def hook(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == step:
            act()

    handle = register_optimizer_step_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_evaluation(observe: Events, act: Callable[[], None], at: int) -> Iterator[list[int]]:
    """Act in the ``at``-th evaluated batch; yields a list that grows with each of them."""
    seen: list[int] = []

    def hook(module: torch.nn.Module, *_: Any) -> None:
        if type(module).__name__ == "LlamaModel" and not module.training and "train" in observe.phases():
            seen.append(len(seen) + 1)
            if len(seen) == at:
                act()

    handle = torch.nn.modules.module.register_module_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def twice() -> None:
    interrupt()
    interrupt()


def test_two_interrupts_in_the_optimizers_step_leave_the_adapter_of_that_step(model: Path, tmp_path: Path) -> None:
    observe = Events()
    with in_optimizer(twice, step=2), pytest.raises(InterruptedRunError, match="the adapter is in"):
        finetune(model, ROWS, tmp_path, max_steps=9, observe=observe)
    assert observe.steps(StepEvent) == [1, 2], "the step that was held is not told"
    two = finetune(model, ROWS, tmp_path / "two", max_steps=2)
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (two.adapter_dir / WEIGHTS).read_bytes()


EVALUATED = {"eval_data": tiny.make_rows(20), "per_device_train_batch_size": 1, "packing": False}


def test_the_evaluation_before_training_is_cut_and_one_step_taken(model: Path, tmp_path: Path) -> None:
    observe = Events()
    with in_evaluation(observe, interrupt, at=2) as seen:
        run = finetune(model, ROWS, tmp_path, max_steps=9, observe=observe, **EVALUATED)
    assert seen == [1, 2], "the evaluation went on"
    assert (run.status, run.report.reason) == ("stopped", INTERRUPTED)
    assert (observe.steps(StepEvent), observe.steps(StoppedEvent), observe.steps(EvalEvent)) == ([1], [1], [])
    assert "this evaluation was cut short" in [e.text for e in observe.all if isinstance(e, NoteEvent)]
    one = finetune(model, ROWS, tmp_path / "one", max_steps=1, **EVALUATED)
    assert (run.adapter_dir / WEIGHTS).read_bytes() == (one.adapter_dir / WEIGHTS).read_bytes()


STEPWISE = {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": False}


@pytest.mark.parametrize("more", [{}, {"metric_for_best_model": "loss"}, {"dataloader_num_workers": 1}])
def test_an_evaluation_between_steps_is_cut_and_no_further_step_taken(
    model: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    observe = Events()
    with in_evaluation(observe, interrupt, at=3) as seen:
        run = finetune(model, ROWS, tmp_path, max_steps=9, observe=observe, trl={**STEPWISE, **more}, **EVALUATED)
    assert len(seen) == 3
    assert (run.status, run.report.reason) == ("stopped", INTERRUPTED)
    assert (observe.steps(StepEvent), observe.steps(StoppedEvent), observe.steps(EvalEvent)) == ([1, 2], [2], [])


def test_a_stop_after_a_step_skips_the_evaluation_that_was_due(model: Path, tmp_path: Path) -> None:
    observe = Events()
    with in_optimizer(interrupt, step=2), in_evaluation(observe, interrupt, at=99) as seen:
        run = finetune(model, ROWS, tmp_path, max_steps=9, observe=observe, trl=STEPWISE, **EVALUATED)
    assert (run.status, seen, observe.steps(StoppedEvent)) == ("stopped", [], [2])


def test_the_last_evaluation_cut_short_leaves_a_run_that_is_done(model: Path, tmp_path: Path) -> None:
    observe = Events()
    options = {**EVALUATED, "trl": {"eval_on_start": False}}
    with in_evaluation(observe, interrupt, at=2) as seen:
        run = finetune(model, ROWS, tmp_path, max_steps=3, observe=observe, **options)
    assert (run.status, len(run.report.steps), seen) == ("done", 3, [1, 2])
    assert (observe.steps(EvalEvent), observe.steps(StoppedEvent)) == ([], [])


def test_a_second_interrupt_in_an_evaluation_raises_with_the_steps_kept(model: Path, tmp_path: Path) -> None:
    observe = Events()
    with in_evaluation(observe, twice, at=2), pytest.raises(InterruptedRunError, match="the adapter is in"):
        finetune(model, ROWS, tmp_path, max_steps=9, observe=observe, trl=STEPWISE, **EVALUATED)
    assert (tmp_path / "adapter" / WEIGHTS).is_file()


def test_one_interrupt_while_saving_changes_nothing(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=2, observe=Events("save"))
    assert run.status == "done" and (run.adapter_dir / WEIGHTS).is_file()


def test_two_interrupts_while_saving_raise_when_all_is_saved(model: Path, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError, match=r"interrupted while saving; what was saved last is .*adapter$"):
        finetune(model, ROWS, tmp_path, max_steps=2, observe=Events("save", times=2))
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"
    two = finetune(model, ROWS, tmp_path / "two", max_steps=2)
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (two.adapter_dir / WEIGHTS).read_bytes()


def test_three_interrupts_break_into_saving_and_leave_the_former_adapter_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    former = finetune(model, ROWS, tmp_path, max_steps=1)
    before = {f.name: f.read_bytes() for f in former.adapter_dir.iterdir()}
    saving, synced, sync = False, 0, os.fsync

    def watch(event: Any) -> None:
        nonlocal saving
        saving = saving or (isinstance(event, PhaseEvent) and event.phase == "save")

    def fsync(file: int) -> None:
        nonlocal synced
        sync(file)
        synced += saving
        if synced == 3:
            twice()
            interrupt()

    told = "interrupted while saving; what was saved last is .*step-000003"
    with monkeypatch.context() as disk, pytest.raises(InterruptedRunError, match=told):
        disk.setattr(os, "fsync", fsync)
        finetune(model, ROWS, tmp_path, max_steps=3, observe=watch)
    assert {f.name: f.read_bytes() for f in former.adapter_dir.iterdir()} == before
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == [], "half-written files were left"


@pytest.mark.parametrize("phase", ["look", "load"])
def test_an_interrupt_before_training_raises_at_once_and_frees_the_memory(
    model: Path, tmp_path: Path, phase: str
) -> None:
    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), torch.nn.Parameter) for o in gc.get_objects())

    before = tensors()
    with pytest.raises(InterruptedRunError, match="interrupted before training began; nothing was saved"):
        finetune(model, ROWS, tmp_path, max_steps=9, observe=Events(phase))
    assert tensors() == before
    assert not (tmp_path / "adapter").exists()
