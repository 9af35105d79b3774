"""Runs that leave a checkpoint after every step, and what has to be the same after going on from one."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbqlora
from nbqlora.core.events import EvalEvent, NoteEvent, StepEvent
from nbqlora.hub.atomic import write_json
from nbqlora.hub.checkpoint import FORMAT
from nbqlora.hub.sealed import read_sealed, sealed
from tests import tiny

ROWS = tiny.make_rows(10)
EVAL = tiny.make_rows(3, seed=1)
# 10 rows, 4 a step: the last step of each of 3 epochs is smaller.
OPTIONS: dict[str, Any] = {
    "max_length": 96,
    "effective_batch_size": 4,
    "learning_rate": 1e-2,
    "warmup_ratio": 0.2,
    "lora_r": 4,
    "lora_dropout": 0.1,
    "num_train_epochs": 3,
    "packing": False,
    "padding_free": False,
}
EVERY_STEP: dict[str, Any] = {"save_minutes": 1e-9, "trl": {"save_total_limit": 99}}
EPOCH, TOTAL = 3, 9


def finetune(model: Path, out: Path, *, data: Any = None, **changes: Any) -> nbqlora.Run:
    options = {**OPTIONS, "model": str(model), "output_dir": str(out), **changes}
    return nbqlora.finetune(data=ROWS if data is None else data, **options)


def plan(model: Path, out: Path, *, data: Any = None, **changes: Any) -> nbqlora.Plan:
    options = {**OPTIONS, "model": str(model), "output_dir": str(out), **changes}
    return nbqlora.plan(data=ROWS if data is None else data, **options)


def saved_steps(out: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in (out / "checkpoints").iterdir())


def edit_state(out: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change what a checkpoint's ``state.json`` says."""
    file = out / "checkpoints" / f"step-{step:06d}" / "state.json"
    value = read_sealed(file, form=FORMAT)
    change(value)
    write_json(sealed(value, form=FORMAT), file)


def until(step: int, whole: Path, out: Path) -> Path:
    """The folder of a run that was killed after this step's checkpoint."""
    shutil.copytree(whole / "checkpoints", out / "checkpoints")
    for folder in (out / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return out


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def figures(run: nbqlora.Run) -> list[tuple[Any, ...]]:
    """Every figure of the training, in order, to the last bit."""
    steps = [(e.step, e.total_steps, e.loss, e.grad_norm, e.learning_rate, e.n_tokens) for e in run.report.steps]
    evals = [(e.step, e.loss) for e in run.report.evals]
    order = [(type(e).__name__, e.step) for e in run.events if isinstance(e, (StepEvent, EvalEvent))]
    return [*steps, *evals, *order]


def same(run: nbqlora.Run, whole: nbqlora.Run) -> bool:
    return figures(run) == figures(whole) and weights(run.adapter_dir) == weights(whole.adapter_dir)


def notes(run: nbqlora.Run) -> list[str]:
    return [e.text for e in run.events if isinstance(e, NoteEvent)]


class InterruptAfter:
    """Presses Ctrl-C when a step is told."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, StepEvent) and event.step == self.step:
            os.kill(os.getpid(), signal.SIGINT)
