"""Two processes whose layers' weights are split over both, through ``nbqlora.finetune``; each says what it saw.

``python -m tests.run.sharded_job FOLDER`` with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbqlora
from nbqlora.core.errors import NbqloraError
from nbqlora.core.events import NoteEvent
from tests.quick import quick_runs
from tests.run import resuming
from tests.run.ranks_job import seen

# Three steps, the last of which is smaller.
PLAIN: dict[str, Any] = {"lora_dropout": 0.0, "eval_data": resuming.EVAL, "num_train_epochs": 1}


def finetune(model: Path, out: Path, **changes: Any) -> dict[str, Any]:
    """A run, and what it says of itself; talking to its model is tried behind it."""
    events: list[Any] = []

    def observe(event: Any) -> None:
        found = seen(event)
        if found and not isinstance(event, NoteEvent):
            events.append(found)

    run = nbqlora.finetune(**{
        **resuming.OPTIONS, "model": str(model), "data": resuming.ROWS, "output_dir": str(out), "observe": observe,
        **PLAIN, **changes,
    })  # fmt: skip
    try:
        said = run.chat("sun")
    except NbqloraError as error:
        said = f"{type(error).__name__}: {error}"
    return {"events": events, "status": run.status, "shards": run.plan.shards, "said": said}


def main(folder: str) -> None:
    """One rank."""
    rank, made = int(os.environ["RANK"]), Path(folder)

    def own(name: str) -> Path:
        return made / name if rank == 0 else made / f"{name}, rank {rank}"

    with quick_runs():
        found = {
            "split": finetune(made / "model", own("split"), fsdp=True, **resuming.EVERY_STEP),
            "whole": finetune(made / "model", own("whole on each"), fsdp=False),
            "one to two": finetune(made / "model", made / "one to two", fsdp=True, resume=True),
            "in NF4": finetune(made / "nf4", own("in NF4"), fsdp=True, max_steps=2),
        }
    (made / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
