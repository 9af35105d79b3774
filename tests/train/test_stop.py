"""An interrupt finishes the step and keeps the work; a second one raises; each leaves the handler as it was."""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbqlora
from nbqlora.core.events import EvalEvent, NoteEvent, StepEvent, StoppedEvent
from nbqlora.train.stop import INTERRUPTED, TIME_IS_UP, Stop
from tests import tiny
from tests.train.parts import finetune

ROWS = tiny.make_rows(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """Whatever a test does, SIGINT is handled afterwards as it was before."""
    before = signal.getsignal(signal.SIGINT)
    yield before
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before


def interrupt() -> None:
    """As the terminal or ipykernel does it: from outside the main thread."""
    thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
    thread.start()
    thread.join()


class After:
    """Interrupts when a step is told."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, StepEvent) and event.step == self.step:
            interrupt()


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
    notes = [e.text for e in observe.events if isinstance(e, NoteEvent)]
    assert "stopping after this step; a second interrupt drops the step" in notes
    # What is saved is the adapter of that step: the same as of a run of three steps.
    three = finetune(model, ROWS, tmp_path / "three", max_steps=3, eval_data=ROWS[:2])
    assert three.status == "done"
    name = "adapter_model.safetensors"
    assert (run.adapter_dir / name).read_bytes() == (three.adapter_dir / name).read_bytes()


def test_a_second_interrupt_raises(model: Path, tmp_path: Path) -> None:
    class Twice(After):
        def __call__(self, event: Any) -> None:
            super().__call__(event)
            if isinstance(event, NoteEvent) and event.text.startswith("stopping"):
                interrupt()

    observe = Twice(2)
    with pytest.raises(KeyboardInterrupt):
        finetune(model, ROWS, tmp_path, max_steps=9, observe=observe)
    assert [e.step for e in observe.events if isinstance(e, StepEvent)] == [1, 2]
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    # What is kept is the last whole step.
    two, name = finetune(model, ROWS, tmp_path / "two", max_steps=2), "adapter_model.safetensors"
    assert (tmp_path / "adapter" / name).read_bytes() == (two.adapter_dir / name).read_bytes()


def test_an_interrupt_in_the_last_step_changes_nothing(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=3, observe=After(2))
    assert run.status == "done" and len(run.report.steps) == 3
    assert not any(isinstance(e, StoppedEvent) for e in run.events)


def test_a_stop_inside_an_epoch_of_small_batches(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, per_device_train_batch_size=1, num_train_epochs=2, observe=After(1))
    assert run.status == "stopped" and [e.step for e in run.report.steps] == [1, 2]


def test_time_is_up_after_one_step(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=9, max_minutes=1e-6)
    assert (run.status, run.report.reason) == ("stopped", TIME_IS_UP)
    assert len(run.report.steps) == 1 and run.adapter_dir.is_dir()


def test_outside_the_main_thread_no_handler_is_set_and_it_trains(model: Path, tmp_path: Path, handler: Any) -> None:
    runs: list[nbqlora.Run] = []
    handlers: list[Any] = []

    def work() -> None:
        runs.append(
            finetune(
                model, ROWS, tmp_path, max_steps=2, observe=lambda _: handlers.append(signal.getsignal(signal.SIGINT))
            )
        )

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert runs[0].status == "done" and len(runs[0].report.steps) == 2
    assert all(h is handler for h in handlers)


def test_the_handler_is_there_only_while_training(model: Path, tmp_path: Path, handler: Any) -> None:
    seen: list[tuple[str, bool]] = []

    def look(event: Any) -> None:
        seen.append((type(event).__name__, signal.getsignal(signal.SIGINT) is handler))

    finetune(model, ROWS, tmp_path, max_steps=1, observe=look)
    assert ("StepEvent", False) in seen and ("SavedEvent", True) in seen and ("PlannedEvent", True) in seen


def test_an_error_in_training_restores_the_handler(model: Path, tmp_path: Path) -> None:
    def fail(event: Any) -> None:
        if isinstance(event, StepEvent):
            raise LookupError("a view of the user's own")

    with pytest.raises(LookupError, match="a view of the user's own"):
        finetune(model, ROWS, tmp_path, max_steps=3, observe=fail)


def test_stop_by_request_and_once() -> None:
    stop = Stop()
    assert stop.reason == ""
    stop.request("enough")
    stop.request("more")
    assert stop.reason == "enough"


def test_a_note_that_cannot_be_printed_now_does_not_stop_the_run() -> None:
    def refuse() -> None:
        raise RuntimeError("reentrant call inside <_io.BufferedWriter name='<stdout>'>")

    with Stop(on_request=refuse) as stop:
        interrupt()
        assert stop.reason == INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_an_interrupt_after_time_is_up_is_still_the_first() -> None:
    with Stop(max_minutes=1e-9) as stop:
        assert stop.reason == TIME_IS_UP
        interrupt()
        assert stop.reason == INTERRUPTED
