"""Two processes that train together, through ``nbqlora.finetune``, one run after another; each says what it saw.

``python -m tests.run.ranks_job FOLDER`` with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbqlora
from nbqlora.core.errors import NbqloraError
from nbqlora.core.events import EvalEvent, Event, NoteEvent, SavedEvent, StepEvent, StoppedEvent
from tests.quick import quick_runs
from tests.run import resuming

# What is compared with one process; dropout is drawn by place, so it is another one on two.
PLAIN: dict[str, Any] = {"lora_dropout": 0.0, "eval_data": resuming.EVAL}
# 10 rows, 4 a step: the last step of an epoch has 2, which is one on each rank, or none on some.
LAYOUTS: dict[str, dict[str, Any]] = {
    "padded": {"padding_free": False},
    "accumulated": {"padding_free": False, "per_device_train_batch_size": 1},
    "joined": {"padding_free": None},
    "uneven": {"padding_free": None, "effective_batch_size": 3},
    "packed": {"packing": True, "padding_free": None, "max_length": 120, "effective_batch_size": 3},
    "other adapters": {"padding_free": None, "peft": {"use_dora": True}},
}


def seen(event: Event) -> Any:
    """What of an event is looked at."""
    match event:
        case StepEvent():
            return ["step", event.step, event.loss, event.grad_norm, event.learning_rate, event.n_tokens]
        case EvalEvent():
            return ["eval", event.step, event.loss]
        case StoppedEvent():
            return ["stopped", event.step, event.reason]
        case SavedEvent():
            return ["saved", event.step, Path(event.path).name]
        case NoteEvent():
            return ["note", event.text]
        case _:
            return None


def told(run: Callable[[Callable[[Event], None]], nbqlora.Run], at: Callable[[Event], None]) -> dict[str, Any]:
    """Everything that a run says, and how it ends."""
    events: list[Any] = []

    def observe(event: Event) -> None:
        if found := seen(event):
            events.append(found)
        at(event)

    try:
        done = run(observe)
    except NbqloraError as error:
        return {"events": events, "error": [type(error).__name__, str(error)], "status": ""}
    plan = done.plan
    return {
        "events": events,
        "error": [],
        "status": done.status,
        "plan": [plan.n_cards, plan.micro_batch_size, plan.gradient_accumulation_steps, plan.effective_batch_size],
    }


def interrupts_itself(step: int, rank: int, when: int) -> Callable[[Event], None]:
    """A rank that gets SIGINT when it tells this step."""

    def at(event: Event) -> None:
        if rank == when and isinstance(event, StepEvent) and event.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return at


def runs(folder: Path, rank: int) -> dict[str, dict[str, Any]]:
    """All of them, by name; the first rank's folder is where files are to be."""

    def finetune(name: str, at: Callable[[Event], None] = lambda event: None, **changes: Any) -> dict[str, Any]:
        own = folder / name if changes.pop("shared", False) or rank == 0 else folder / f"{name}, rank {rank}"
        model = changes.pop("model", folder / "model")
        return told(lambda observe: resuming.finetune(model, own, observe=observe, **changes), at)

    found = {name: finetune(name, **{**PLAIN, **layout}) for name, layout in LAYOUTS.items() if name != "padded"}
    found["padded"] = finetune("padded", **PLAIN, **resuming.EVERY_STEP)
    for name in ("one to two", "dropout"):
        changes = PLAIN if name == "one to two" else {"eval_data": resuming.EVAL}
        if name == "dropout":
            found[name] = finetune(name, shared=True, **changes, **resuming.EVERY_STEP)
            if rank == 0:
                resuming.until(4, folder / name, folder / "dropout again")
            name = "dropout again"
        found[name] = finetune(name, shared=True, resume=True, **changes)
    stop = interrupts_itself(2, rank, when=1)
    found["stopped"] = finetune("stopped", stop, **PLAIN)
    in_order = {"train_sampling_strategy": "sequential"}
    bad = json.loads((folder / "bad.json").read_text())
    found["not finite"] = finetune("not finite", model=folder / "bad model", data=bad, trl=in_order, **PLAIN)
    found["not alike"] = finetune("not alike", **PLAIN, learning_rate=1e-3 * (1 + rank))
    found["on one alone"] = finetune("on one alone", **PLAIN, data=["no row"] if rank else resuming.ROWS)
    return found


def main(folder: str) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    with quick_runs():
        found = runs(Path(folder), rank)
    assert int(os.environ["RANK"]) == rank, "the environment is as it was"
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
