"""Whole runs that run out of memory: resumed they are the same, and one that finds none ends with an answer."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.optim import AdamW, Optimizer

from nbqlora.core.errors import DoesNotFitError, MemoryExhaustedError
from nbqlora.core.events import OomEvent, StepEvent
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.layer import Layer
from nbqlora.view.text import event_line, report_text
from tests import tiny
from tests.train.parts import finetune, losses
from tests.train.shortages import Shortages, in_optimizer, model, short, shortages

__all__ = ["model", "short"]  # fixtures
ROWS = tiny.make_rows(16)
WEIGHTS = "adapter_model.safetensors"
TWO: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": None,
    "lora_dropout": 0.1, "max_steps": 4,
}  # fmt: skip


class BreakOff:
    """Breaks the run off when a step is told, as a lost session would."""

    def __init__(self, step: int, also: Any) -> None:
        self.step, self.also = step, also

    def __call__(self, event: Any) -> None:
        self.also(event)
        if isinstance(event, StepEvent) and event.step == self.step:
            raise ConnectionResetError("the session was lost")


def keeps(layer: Layer, x: torch.Tensor) -> bool:
    return layer.policy is LayerPolicy.KEEP


def test_stopped_and_resumed_it_is_the_same_run(model: Path, tmp_path: Path, short: Shortages) -> None:
    whole = finetune(model, ROWS, tmp_path / "whole", **TWO)
    # In the second step memory runs out and layers keep less from then on; so once more in the resumed part.
    short.when("backward", lambda layer, x: short.calls["backward"] > 8 and keeps(layer, x))
    with pytest.raises(ConnectionResetError):
        finetune(model, ROWS, tmp_path / "parts", **TWO, save_minutes=1e-9, observe=BreakOff(3, short))
    n_failed = len(short.failed)
    parts = finetune(model, ROWS, tmp_path / "parts", **TWO, resume=True, observe=short)
    assert 0 < n_failed < len(short.failed)
    assert losses(parts) == losses(whole)
    assert [e.n_tokens for e in parts.report.steps] == [e.n_tokens for e in whole.report.steps]
    assert (parts.adapter_dir / WEIGHTS).read_bytes() == (whole.adapter_dir / WEIGHTS).read_bytes()


def test_the_report_says_what_happened_and_what_ran_in_the_end(model: Path, tmp_path: Path, short: Shortages) -> None:
    told: list[str] = []

    def observe(event: Any) -> None:
        short(event)
        if isinstance(event, OomEvent):
            told.append(event_line(event))

    short.when("backward", keeps)
    run = finetune(model, ROWS, tmp_path, **TWO, observe=observe)
    assert run.status == "done" and len(run.report.steps) == 4
    assert LayerPolicy.KEEP not in run.plan.layer_policies
    assert told[0] == "  memory ran out in step 1 (backward, 2.0 GiB asked for): unused memory was given back"
    assert told[1].endswith("3 more layers compute their MLP again in the backward")
    text = report_text(run.report)
    assert "memory     ran out 1 time, step 1 (backward)" in text
    assert "3 more layers compute their MLP again in the backward" in str(run.plan)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert stored["plan"]["layer_policies"] == ["recompute_mlp"] * 3
    assert [e["kind"] for e in stored["events"]].count("OomEvent") == len(told) == 2


def test_nothing_fits(model: Path, tmp_path: Path, short: Shortages) -> None:
    held: list[weakref.ref[Any]] = []
    events: list[Any] = []

    def observe(event: Any) -> None:
        short(event)
        events.append(event)
        if isinstance(event, StepEvent) and not held:
            for found in [o for o in gc.get_objects() if issubclass(type(o), PeftModel)]:
                held.extend(weakref.ref(t) for t in (found, *found.parameters(), *found.buffers()))
            short.when("backward", lambda layer, x: True)

    with pytest.raises(MemoryExhaustedError) as caught:
        finetune(model, ROWS, tmp_path, **{**TWO, "lora_dropout": 0.0}, observe=observe)
    first, fits, given_back = str(caught.value).splitlines()
    assert "memory ran out (backward, 2.0 GiB asked for, on one document of " in first
    assert "with nothing left to lower: layers 3 recompute, the loss takes 64 tokens at once" in first
    assert fits.startswith(("  max_length = 64 fits in the ", "  no max_length fits in the "))
    assert given_back == f"  all memory of this run was given back; the adapter of step 1 is in {tmp_path / 'adapter'}"
    assert isinstance(caught.value, DoesNotFitError) and isinstance(caught.value, MemoryError)
    gc.collect()
    assert held and [r for r in held if r() is not None] == []
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    short.when("backward", lambda layer, x: False)
    one = finetune(model, ROWS, tmp_path / "one", **{**TWO, "lora_dropout": 0.0, "max_steps": 1})
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (one.adapter_dir / WEIGHTS).read_bytes()


def test_nothing_fits_in_the_first_step(model: Path, tmp_path: Path, short: Shortages) -> None:
    short.when("forward", lambda layer, x: True)
    with pytest.raises(MemoryExhaustedError, match="no step was taken before it"):
        finetune(model, ROWS, tmp_path, **TWO, observe=short)
    assert not (tmp_path / "adapter").exists()


def test_an_optimizer_that_never_finds_room(model: Path, tmp_path: Path) -> None:
    events: list[Any] = []
    with in_optimizer(*range(2, 9)), pytest.raises(MemoryExhaustedError) as caught:
        finetune(model, ROWS, tmp_path, **TWO, observe=events.append)
    assert "memory ran out (optimizer, 2.0 GiB asked for) with nothing left to lower\n" in str(caught.value)
    assert [e.action for e in shortages(events)] == ["unused memory was given back"]
    assert (tmp_path / "adapter" / WEIGHTS).is_file()


def test_in_the_middle_of_an_optimizers_step_the_adapter_is_not_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, calls = AdamW.step.__wrapped__, []  # type: ignore[attr-defined]

    def step(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            update(self, *args)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
        return update(self, *args)

    hooked = Optimizer.profile_hook_step(step)
    hooked.hooked = True  # type: ignore[attr-defined]
    monkeypatch.setattr(AdamW, "step", hooked)
    with pytest.raises(MemoryExhaustedError, match="the optimizer's step, which cannot be taken back") as caught:
        finetune(model, ROWS, tmp_path, **TWO)
    assert str(caught.value).endswith("all memory of this run was given back; nothing was saved")
    assert not (tmp_path / "adapter").exists()
