"""Two processes that train together, one of which finds no memory around an optimizer's step; each says what it saw.

``python -m tests.run.short_step_job FOLDER`` with the variables that torchrun sets.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from torch.optim.optimizer import register_optimizer_step_post_hook

from nbqlora.core.events import Event, OomEvent, StepEvent
from tests.quick import quick_runs
from tests.run import resuming
from tests.run.ranks_job import PLAIN, told
from tests.train.shortages import Shortages, in_optimizer, out_of_memory

# The step that one rank finds no memory for, of so many; an epoch has three.
STEP, TOTAL = 2, 4
Failing = Callable[[], AbstractContextManager[Any]]


@contextmanager
def cut(step: int = STEP, *, error: Callable[[], BaseException] = out_of_memory) -> Iterator[None]:
    """When the update is written, but not known to be."""
    steps: list[int] = []

    def hook(*_: Any) -> None:
        steps.append(len(steps) + 1)
        if steps[-1] == step:
            raise error()

    handle = register_optimizer_step_post_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def always(name: str, step: int) -> Iterator[None]:
    """From this call on a function of the trainer's finds no memory."""
    from nbqlora.train import enduring_trainer, trainer

    where = trainer if hasattr(trainer, name) else enduring_trainer
    whole, calls = getattr(where, name), []

    def short(*args: Any) -> Any:
        calls.append(args)
        if len(calls) >= step:
            raise out_of_memory()
        return whole(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, name, short)
        yield


# Name -> the rank that is short, and how.
ENDS: dict[str, tuple[int, Failing]] = {
    "not begun on 1": (1, lambda: in_optimizer(STEP, STEP + 1)),
    "not begun on 0": (0, lambda: in_optimizer(STEP, STEP + 1)),
    "cut on 1": (1, cut),
    "cut on 0": (0, cut),
    "not clipped on 0": (0, lambda: always("clip_", STEP)),
    "no states on 1": (1, lambda: always("make_states", 1)),
    "last on 1": (1, lambda: cut(TOTAL)),
}


class Ranks:
    """Runs of this rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def run(self, name: str, failing: Failing = nullcontext, at: Any = None, **changes: Any) -> dict[str, Any]:
        """One run in a folder that both see; its shortages beside what is told of every run."""
        short: list[Any] = []

        def observe(event: Event) -> None:
            if isinstance(event, OomEvent):
                short.append([event.step, event.phase, event.action])
            if at is not None:
                at(event)

        began = time.monotonic()
        with failing():
            found = told(
                lambda tell: resuming.finetune(
                    self._folder / "model", self._folder / name, observe=tell, max_steps=TOTAL, **{**PLAIN, **changes}
                ),
                observe,
            )
        return {**found, "short": short, "seconds": time.monotonic() - began}

    def goes_on(self) -> dict[str, Any]:
        """The second rank gives memory back for its second step; in the third one a layer of the first is short."""
        failing = (lambda: in_optimizer(STEP)) if self._rank == 1 else nullcontext
        with pytest.MonkeyPatch.context() as patch:
            short = Shortages(patch)

            def at(event: Event) -> None:
                short(event)
                if self._rank == 0 and isinstance(event, StepEvent) and event.step == STEP:
                    short.at("forward", short.calls["forward"] + 1)

            return self.run("goes on", failing, at)

    def ends(self, name: str) -> dict[str, Any]:
        """A run that ends, with checkpoints where the first rank's step is not taken, since nothing is saved then."""
        rank, failing = ENDS[name]
        every_step = resuming.EVERY_STEP if rank == 0 else {}
        return self.run(name, failing if rank == self._rank else nullcontext, **every_step)


def main(folder: str) -> None:
    """One rank."""
    rank = int(os.environ["RANK"])
    ranks = Ranks(Path(folder), rank)
    with quick_runs():
        found = {"whole": ranks.run("whole"), "goes on": ranks.goes_on()}
        found |= {name: ranks.ends(name) for name in ENDS}
        found["resumed"] = ranks.run("cut on 1", resume=True)
    (Path(folder) / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
