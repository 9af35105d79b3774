"""Whole runs that begin with a probe step: resumed, stopped in it, and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import InterruptedRunError
from nbqlora.core.events import NoteEvent, StepEvent
from nbqlora.engine import fused
from nbqlora.train.probe_step import ProbeStep
from tests import tiny
from tests.train.interrupts import handler, interrupt
from tests.train.parts import finetune, losses
from tests.train.shortages import model

__all__ = ["handler", "model"]  # fixtures
ROWS = tiny.make_rows(16)
WEIGHTS = "adapter_model.safetensors"
TWO: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": None,
    "lora_dropout": 0.1, "max_steps": 4,
}  # fmt: skip


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card."""
    monkeypatch.setattr("nbqlora.run.job.probes", lambda device: True)


class InProbe:
    """Does something in the middle of each probe, after a layer's forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.act: Callable[[], None] = lambda: None
        self.done = 0
        probes, forward, inside = ProbeStep.__call__, fused.layer_forward, []

        def probe(step: ProbeStep) -> Any:
            inside.append(True)
            try:
                return probes(step)
            finally:
                inside.clear()

        def layer_forward(*args: Any, **kwargs: Any) -> Any:
            found = forward(*args, **kwargs)
            if inside:
                inside.clear()
                self.done += 1
                self.act()
            return found

        monkeypatch.setattr(ProbeStep, "__call__", probe)
        monkeypatch.setattr(fused, "layer_forward", layer_forward)


@pytest.fixture
def in_probe(always: None, monkeypatch: pytest.MonkeyPatch) -> InProbe:
    return InProbe(monkeypatch)


def break_off(step: int) -> Callable[[Any], None]:
    def observe(event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == step:
            raise ConnectionResetError("the session was lost")

    return observe


def told(run: Any) -> list[str]:
    return [e.text for e in run.events if isinstance(e, NoteEvent) and e.text.startswith("corrected after the probe")]


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_resumed_with_a_probe_it_is_the_run_that_had_none(
    optim: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finetune(model, ROWS, tmp_path / "whole", **TWO, optim=optim)
    assert told(whole) == []
    with pytest.raises(ConnectionResetError):
        finetune(model, ROWS, tmp_path / "parts", **TWO, optim=optim, save_minutes=1e-9, observe=break_off(3))
    monkeypatch.setattr("nbqlora.run.job.probes", lambda device: True)
    rest = finetune(model, ROWS, tmp_path / "parts", **TWO, optim=optim, resume=True)
    assert len(told(rest)) == 1 and losses(rest) == losses(whole)
    assert (rest.adapter_dir / WEIGHTS).read_bytes() == (whole.adapter_dir / WEIGHTS).read_bytes()


def test_begun_with_a_probe_and_resumed_with_another(
    model: Path, tmp_path: Path, in_probe: InProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionResetError):
        finetune(model, ROWS, tmp_path / "parts", **TWO, save_minutes=1e-9, observe=break_off(2))
    rest = finetune(model, ROWS, tmp_path / "parts", **TWO, resume=True)
    assert in_probe.done == 2 and rest.status == "done"
    monkeypatch.setattr("nbqlora.run.job.probes", lambda device: False)
    whole = finetune(model, ROWS, tmp_path / "whole", **TWO)
    assert losses(rest) == losses(whole)
    assert (rest.adapter_dir / WEIGHTS).read_bytes() == (whole.adapter_dir / WEIGHTS).read_bytes()


def test_what_it_measured_is_told_and_reported(model: Path, tmp_path: Path, always: None) -> None:
    run = finetune(model, ROWS, tmp_path, **TWO)
    (line,) = told(run)
    probed, plan = run.plan.probed, run.plan
    longest = max(len(_ids(row)) for row in ROWS)
    assert probed is not None and longest < probed.tokens <= 2 * longest
    assert probed.peak_bytes > plan.device.context_bytes / 2 and 0 < probed.seconds <= probed.total_seconds
    assert plan.step_seconds is not None and plan.step_seconds <= 2 * probed.seconds
    assert line.endswith(f"it took {probed.total_seconds:.1f} s")
    phases = [p.phase for p in run.report.memory.phases]
    assert phases == ["load", "probe", "forward", "backward", "optimizer", "save"]
    assert "probe      " in str(plan) and "measured before the first step" in str(plan)
    assert json.loads((tmp_path / "run.json").read_text())["plan"]["probed"]["tokens"] == probed.tokens
    first = run.report.steps[0]
    assert first.elapsed_seconds - first.seconds >= probed.total_seconds, "its time is no step's"


def _ids(row: dict[str, Any]) -> list[int]:
    return list(tiny.make_tokenizer().apply_chat_template(row["messages"], return_dict=False))


def test_a_stop_in_it_ends_the_run_after_its_first_step(
    model: Path, tmp_path: Path, in_probe: InProbe, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_probe.act = interrupt
    run = finetune(model, ROWS, tmp_path / "run", **TWO)
    assert in_probe.done == 1 and (run.status, len(run.report.steps)) == ("stopped", 1)
    in_probe.act = lambda: None
    rest = finetune(model, ROWS, tmp_path / "run", **TWO, resume=True)
    monkeypatch.setattr("nbqlora.run.job.probes", lambda device: False)
    whole = finetune(model, ROWS, tmp_path / "whole", **TWO)
    assert losses(rest) == losses(whole)


def twice() -> None:
    interrupt()
    interrupt()


def test_the_second_one_gives_it_up_with_nothing_done(model: Path, tmp_path: Path, in_probe: InProbe) -> None:
    in_probe.act = twice
    with pytest.raises(InterruptedRunError, match="no step was done, so nothing was saved"):
        finetune(model, ROWS, tmp_path, **TWO)
    assert not (tmp_path / "adapter").exists()


def test_the_second_one_in_a_resumed_run_keeps_what_was_done(model: Path, tmp_path: Path, in_probe: InProbe) -> None:
    one = finetune(model, ROWS, tmp_path / "one", **{**TWO, "lr_scheduler_type": "constant", "max_steps": 2})
    with pytest.raises(ConnectionResetError):
        finetune(model, ROWS, tmp_path / "run", **TWO, save_minutes=1e-9, observe=break_off(3))
    in_probe.act = twice
    with pytest.raises(InterruptedRunError, match="the adapter is in"):
        finetune(model, ROWS, tmp_path / "run", **TWO, resume=True)
    assert (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes() == (one.adapter_dir / WEIGHTS).read_bytes()
