"""The trainer from inside: what it does to the model, and that it takes all of it back."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.events import StepEvent
from nbqlora.engine.optimize import restore
from nbqlora.train.arguments import trainer_arguments
from tests import tiny
from tests.train.parts import base, finetune, own_loss, parts

ROWS = tiny.make_rows(12)
OTHERS = tiny.make_rows(5, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


def test_lora_stays_as_it_was_initialized(model: Path, tmp_path: Path) -> None:
    # TRL casts the LoRA of a 4-bit model to bf16 in its constructor; a rounded start shows in the bits.
    before: dict[str, torch.Tensor] = {}

    def remember(base: Any) -> None:
        assert base.is_loaded_in_4bit
        before.update({name: p.detach().clone() for name, p in tiny.lora_parameters(base).items()})

    found = parts(model, ROWS, tmp_path, change=remember)
    after = tiny.lora_parameters(found.loaded.model)
    assert before.keys() == after.keys() and len(after) == 3 * 7 * 2
    assert all(p.dtype == torch.float32 and torch.equal(p, before[name]) for name, p in after.items())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in after.values())


def test_arguments_of_a_run(model: Path, tmp_path: Path) -> None:
    found = parts(model, ROWS, tmp_path, eval_data=OTHERS, packing=True)
    made = trainer_arguments(found.config, found.plan, True)
    assert made.save_strategy == "no" and made.eval_strategy == "epoch" and made.eval_on_start
    assert made.gradient_checkpointing is False and made.padding_free and made.logging_nan_inf_filter is False
    assert (made.bf16, made.fp16, made.use_cpu) == (False, False, True)
    assert found.trainer.args.n_gpu == 1  # ``_n_gpu``, which is private, was set


class Doubled(torch.nn.Module):
    """A head that does something to its logits."""

    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.inner(hidden) * 2


def test_another_head_trains_with_its_own_loss(model: Path, tmp_path: Path) -> None:
    def change(loaded: Any) -> None:
        base = loaded.get_base_model()
        base.lm_head = Doubled(base.lm_head)

    found = parts(model, ROWS[:4], tmp_path, change=change, max_steps=1)
    expected, _ = own_loss(found.loaded.model.eval(), ROWS[:4])
    plain, _ = own_loss(base(model), ROWS[:4])
    assert abs(expected - plain) > 0.1
    found.trainer.train()
    assert found.losses == [pytest.approx(expected, rel=1e-6)]


def test_release_takes_everything_off_the_model(model: Path, tmp_path: Path) -> None:
    attributes: dict[str, set[str]] = {}

    def remember(loaded: Any) -> None:
        attributes.update({name: set(vars(m)) for name, m in loaded.named_modules()})

    found = parts(model, ROWS, tmp_path, change=remember, max_steps=2, eval_data=OTHERS)
    loaded, trainer = found.loaded.model, found.trainer
    assert "forward" in vars(loaded.get_base_model())  # TRL's
    trainer.train()
    optimizer = weakref.ref(trainer.optimizer.optimizer)
    trainer.release()
    restore(loaded)
    for module in (loaded, loaded.get_base_model()):
        assert not {"forward", "_original_forward"} & set(vars(module))
        assert module.forward.__func__ is type(module).forward
    assert all(p.grad is None for p in loaded.parameters())
    gc.collect()
    assert optimizer() is None  # although the trainer is still here
    for name, module in loaded.named_modules():
        left = set(vars(module)) - attributes[name]
        assert left <= {"gradient_checkpointing", "_gradient_checkpointing_func", "model_tags"}, (name, left)


def test_after_a_run_the_model_is_its_own_and_the_optimizer_gone(model: Path, tmp_path: Path) -> None:
    optimizers: list[Any] = []

    def look(event: Any) -> None:
        if isinstance(event, StepEvent) and not optimizers:
            optimizers.extend(weakref.ref(o) for o in gc.get_objects() if isinstance(o, torch.optim.AdamW))

    run = finetune(model, ROWS, tmp_path, max_steps=2, observe=look)
    loaded = run._session.loaded
    assert loaded is not None and optimizers
    assert all(reference() is None for reference in optimizers)
    assert loaded.model.get_base_model().forward.__func__ is type(loaded.model.get_base_model()).forward
    assert all(p.grad is None for p in loaded.model.parameters())
