"""After an error nothing of the model is left, even while the error itself is kept, as IPython keeps it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from nbqlora.core.errors import ModelError, NonFiniteLossError
from nbqlora.core.events import PhaseEvent, StepEvent
from tests import tiny
from tests.train.parts import finetune

ROWS = tiny.make_rows(12)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("bad"), bad_token="~")


class Watch:
    """Keeps weak references to the run's model, its weights and its gradients' owners, then does ``then``."""

    def __init__(self, then: Callable[[], None] | None = None, *, at: type = StepEvent) -> None:
        self.then, self.at = then, at
        self.references: list[weakref.ref[Any]] = []

    def __call__(self, event: Any) -> None:
        if isinstance(event, self.at) and not self.references:
            models = [o for o in gc.get_objects() if issubclass(type(o), PeftModel)]
            for found in models:
                tensors = [*found.parameters(), *found.buffers()]
                self.references += [weakref.ref(found), *(weakref.ref(t) for t in tensors)]
            assert len(self.references) > 3 * 7 * 3
            if self.then is not None:
                self.then()

    def alive(self) -> int:
        gc.collect()
        return sum(reference() is not None for reference in self.references)


def fail() -> None:
    raise LookupError("in a view")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("then,error", [(fail, LookupError), (interrupt, KeyboardInterrupt)])
def test_an_error_or_interrupt_frees_the_model(
    model: Path, tmp_path: Path, then: Callable[[], None], error: type[BaseException]
) -> None:
    watch = Watch(then)
    with pytest.raises(error) as caught:
        finetune(model, ROWS, tmp_path, observe=watch)
    assert watch.alive() == 0
    assert caught.value.__traceback__ is not None


def test_a_loss_that_is_not_finite_frees_the_model(model: Path, tmp_path: Path) -> None:
    rows = [*ROWS[:11], {"messages": [{"role": "user", "content": "~"}, {"role": "assistant", "content": "bad"}]}]
    watch = Watch()
    try:
        finetune(model, rows, tmp_path, observe=watch, trl={"train_sampling_strategy": "sequential"})
    except NonFiniteLossError as error:
        kept, trace = error, sys.exc_info()
    assert watch.alive() == 0
    assert kept.__traceback__ is not None and trace[1] is kept
    assert kept.__cause__ is None and kept.__context__ is None


def test_an_error_that_another_one_led_to_frees_the_model(model: Path, tmp_path: Path) -> None:
    # PEFT refuses this on a 4-bit model, in the middle of putting adapters on it: its frames hold the model.
    with pytest.raises(ModelError, match="LoRA cannot be put on this model: Please initialize PiSSA") as caught:
        finetune(model, ROWS, tmp_path, peft={"init_lora_weights": "pissa"})
    gc.collect()
    assert [type(o).__name__ for o in gc.get_objects() if type(o) is LlamaForCausalLM] == []
    assert caught.value.__traceback__ is not None


def test_an_error_before_the_first_step_frees_the_model(model: Path, tmp_path: Path) -> None:
    watch = Watch(at=PhaseEvent)
    seen: list[str] = []

    def observe(event: Any) -> None:
        if isinstance(event, PhaseEvent):
            seen.append(event.phase)
            if event.phase == "train":
                watch(event)
                fail()

    with pytest.raises(LookupError) as caught:
        finetune(model, ROWS, tmp_path, observe=observe)
    assert seen[-1] == "train" and watch.references
    assert watch.alive() == 0
    del caught


def test_a_finished_run_holds_its_model_until_it_is_freed(model: Path, tmp_path: Path) -> None:
    watch = Watch()
    run = finetune(model, ROWS, tmp_path, max_steps=1, observe=watch)
    assert watch.alive() > 0
    run.free()
    assert watch.alive() == 0


def test_the_next_run_frees_the_last_one(model: Path, tmp_path: Path) -> None:
    watch = Watch()
    first = finetune(model, ROWS, tmp_path / "1", max_steps=1, observe=watch)
    finetune(model, ROWS, tmp_path / "2", max_steps=1)
    assert watch.alive() == 0
    assert first.status == "done"
