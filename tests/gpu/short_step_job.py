"""One of two cards that train together; memory runs out on one in an optimizer's step. What it saw goes to a file.

``python -m tests.gpu.short_step_job MODEL FOLDER`` with the variables that torchrun sets, and one card visible.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import nbqlora
from tests.gpu.sharded_job import OPTIONS
from tests.gpu.test_oom_gpu import rows
from tests.run import resuming
from tests.run.ranks_job import told
from tests.run.short_step_job import cut
from tests.train.shortages import in_optimizer

# The step that one rank finds no memory for, of so many.
STEP, TOTAL = 2, 4


def no_memory() -> BaseException:
    """What the card's allocator says to who asks for a pebibyte."""
    try:
        torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
    except torch.OutOfMemoryError as error:
        return error
    raise AssertionError("there was room")


# Name -> the rank that is short, and how.
ENDS: dict[str, tuple[int, Callable[[], AbstractContextManager[Any]]]] = {
    "not begun on 1": (1, lambda: in_optimizer(STEP, STEP + 1, error=no_memory)),
    "cut on 1": (1, lambda: cut(STEP, error=no_memory)),
    "cut on 0": (0, lambda: cut(STEP, error=no_memory)),
}


def finetune(model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """A run of this rank, in a folder that both see, and how long it took."""
    options = {**OPTIONS, "data": rows(32), "max_steps": TOTAL, **changes}
    began = time.monotonic()
    found = told(
        lambda tell: nbqlora.finetune(model=model, output_dir=str(folder), observe=tell, **options), lambda event: None
    )
    return {**found, "seconds": time.monotonic() - began}


def main(model: str, folder: str) -> None:
    """One rank."""
    rank, out = int(os.environ["RANK"]), Path(folder)
    found = {"whole": finetune(model, out / "whole")}
    for name, (short, failing) in ENDS.items():
        with failing() if rank == short else nullcontext():
            found[name] = finetune(model, out / name, **(resuming.EVERY_STEP if short == 0 else {}))
    found["resumed"] = finetune(model, out / "cut on 1", resume=True)
    (out / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
