"""An interrupt finishes the step and keeps the work; a second one raises; each leaves the handlers as they were."""

from __future__ import annotations

import _thread
import json
import signal
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import nbqlora
from nbqlora.core.errors import InterruptedRunError
from nbqlora.core.events import EvalEvent, PhaseEvent, StepEvent, StoppedEvent
from nbqlora.train.stop import INTERRUPTED, TERMINATED, TIME_IS_UP
from tests import tiny
from tests.train.interrupts import ROWS, After, handler, interrupt
from tests.train.parts import finetune

__all__ = ["handler"]  # autouse


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def test_the_first_interrupt_finishes_the_step_and_saves(model: Path, tmp_path: Path) -> None:
    observe = After(2)
    run = finetune(model, ROWS, tmp_path, max_steps=9, eval_data=ROWS[:2], observe=observe)
    assert (run.status, run.report.reason) == ("stopped", INTERRUPTED)
    assert [e.step for e in run.report.steps] == [1, 2, 3]
    kinds = [type(e) for e in observe.events]
    assert kinds.index(StoppedEvent) == max(i for i, k in enumerate(kinds) if k is StepEvent) + 1
    (stopped,) = (e for e in observe.events if isinstance(e, StoppedEvent))
    assert (stopped.step, stopped.reason) == (3, INTERRUPTED)
    assert sum(isinstance(e, EvalEvent) for e in observe.events) == 1  # the one before training
    said = [e.detail for e in observe.events if isinstance(e, PhaseEvent) and e.phase == "stop"]
    assert said == ["after this step; a second interrupt drops the step"]
    # What is saved is the adapter of that step: the same as of a run of three steps.
    three = finetune(model, ROWS, tmp_path / "three", max_steps=3, eval_data=ROWS[:2])
    assert three.status == "done"
    name = "adapter_model.safetensors"
    assert (run.adapter_dir / name).read_bytes() == (three.adapter_dir / name).read_bytes()


def test_a_second_interrupt_raises(model: Path, tmp_path: Path) -> None:
    class Twice(After):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if isinstance(event, PhaseEvent) and event.phase == "stop":
                interrupt()

    observe = Twice(2)
    with pytest.raises(InterruptedRunError, match=r"interrupted in the middle of a step; the adapter is in ") as caught:
        finetune(model, ROWS, tmp_path, max_steps=9, observe=observe)
    assert isinstance(caught.value, KeyboardInterrupt)
    assert [e.step for e in observe.events if isinstance(e, StepEvent)] == [1, 2]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    # What is kept is the last whole step.
    two, name = finetune(model, ROWS, tmp_path / "two", max_steps=2), "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (two.adapter_dir / name).read_bytes()


def test_a_second_interrupt_behind_the_step_drops_none(model: Path, tmp_path: Path) -> None:
    class Late(After):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if isinstance(event, StoppedEvent):
                interrupt()

    with pytest.raises(InterruptedRunError, match=r"^interrupted after step 3; the adapter is in "):
        finetune(model, ROWS, tmp_path, max_steps=9, observe=Late(2))


def test_an_interrupt_in_the_last_step_changes_nothing(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=3, observe=After(2))
    assert run.status == "done" and len(run.report.steps) == 3
    assert not any(isinstance(e, StoppedEvent) for e in run.events)


def test_a_stop_inside_an_epoch_of_small_batches(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, per_device_train_batch_size=1, num_train_epochs=2, observe=After(1))
    assert run.status == "stopped" and [e.step for e in run.report.steps] == [1, 2]


@pytest.mark.parametrize(
    ("by", "reason"), [(_thread.interrupt_main, INTERRUPTED), (partial(interrupt, signal.SIGTERM), TERMINATED)]
)
def test_another_threads_interrupt_and_a_termination_count_as_well(
    model: Path, tmp_path: Path, by: Callable[[], None], reason: str
) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=9, observe=After(1, by))
    assert (run.status, run.report.reason, len(run.report.steps)) == ("stopped", reason, 2)
    assert (run.adapter_dir / "adapter_model.safetensors").is_file()


def test_a_run_always_takes_one_step(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=9, max_minutes=1e-6, eval_data=ROWS)
    assert (run.status, run.report.reason) == ("stopped", TIME_IS_UP)
    assert len(run.report.steps) == 1 and run.adapter_dir.is_dir()
    assert run.report.evals == (), "the evaluation before training was not cut"


def test_max_minutes_count_from_the_start_and_leave_room_for_the_next_step(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = 0.0

    def observe(event: Any) -> None:
        nonlocal minutes
        if isinstance(event, StepEvent) or (isinstance(event, PhaseEvent) and event.phase == "load"):
            minutes += 1

    for module in ("nbqlora.api", "nbqlora.run.journal", "nbqlora.train.events"):
        monkeypatch.setattr(f"{module}.perf_counter", lambda: minutes * 60)
    run = finetune(model, ROWS, tmp_path, max_steps=9, max_minutes=5.5, observe=observe)
    # Loading takes a minute, a step one (the first none): the fifth ends at five, and a sixth has no room.
    assert (run.status, run.report.reason, len(run.report.steps)) == ("stopped", TIME_IS_UP, 5)
    assert run.report.seconds <= 6 * 60


def test_outside_the_main_thread_no_handler_is_set_and_time_still_ends_it(
    model: Path, tmp_path: Path, handler: Any
) -> None:
    runs: list[nbqlora.Run] = []
    handlers: list[Any] = []

    def observe(_: Any) -> None:
        handlers.append(signal.getsignal(signal.SIGINT))

    def work() -> None:
        runs.append(finetune(model, ROWS, tmp_path, max_steps=9, max_minutes=1e-6, observe=observe))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert runs[0].status == "stopped" and len(runs[0].report.steps) == 1
    assert all(h is handler for h in handlers)


def test_the_handler_is_there_while_training_and_saving(model: Path, tmp_path: Path, handler: Any) -> None:
    seen: set[tuple[str, bool]] = set()

    def look(event: Any) -> None:
        seen.add((type(event).__name__, signal.getsignal(signal.SIGINT) is handler))

    finetune(model, ROWS, tmp_path, max_steps=1, observe=look)
    assert {("PlannedEvent", True), ("StepEvent", False), ("SavedEvent", False)} <= seen


def test_an_error_in_training_restores_the_handler(model: Path, tmp_path: Path) -> None:
    def fail(event: Any) -> None:
        if isinstance(event, StepEvent):
            raise LookupError("a view of the user's own")

    with pytest.raises(LookupError, match="a view of the user's own"):
        finetune(model, ROWS, tmp_path, max_steps=3, observe=fail)
