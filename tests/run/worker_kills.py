"""Runs of two ranks, one of which is killed with SIGKILL at a random moment; each is resumed until it is done.

This process stands for the kernel and calls ``nbqlora.finetune(gpus=2, resume=True)`` over and over. A third of the
kills come while the workers start or load, the others around a step, when its checkpoint is written. Each time: the
reason names the rank, no process and no listening port is left, what was saved last is whole; at the end the adapter is
that of a run that nobody killed, bit for bit.

    python -m tests.run.worker_kills --kills 50 --seed 1
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

import nbqlora
from nbqlora.core.errors import TrainingError
from nbqlora.core.events import Event, PhaseEvent, SavedEvent, StepEvent
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, find_checkpoints, first_whole
from tests import tiny

N = 2
# A checkpoint after every step.
OPTIONS: dict[str, Any] = {
    "max_length": 96, "learning_rate": 1e-2, "lora_r": 4, "effective_batch_size": 4, "packing": False, "max_steps": 8,
    "per_device_train_batch_size": 1, "gpus": N, "save_minutes": 1e-9,
}  # fmt: skip
STEPS = OPTIONS["max_steps"]
STARTING_SECONDS = 6.0
AROUND_A_STEP_SECONDS = 0.15
REASON = r"rank (\d) of 2 was killed \(SIGKILL\)"


def workers() -> dict[int, psutil.Process]:
    """Processes of ranks that live, by rank."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            if "nbqlora.run.workers.worker" in process.cmdline():
                found[int(process.environ()["RANK"])] = process
        except (psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
            continue
    return found


def listening() -> set[int]:
    """Ports on which this process or one below it listens."""
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    found = (c for p in ours for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN)
    return {int(c.laddr.port) for c in found}


class Killer:
    """Kills one rank once, at its moment.

    Args:
        at_step: around this step of the run; 0 for a while after the beginning.
    """

    def __init__(self, rank: int, at_step: int, after_seconds: float) -> None:
        self.rank, self._at_step, self._after = rank, at_step, after_seconds
        self.killed, self.phase, self.saved, self.last_step = False, "starting", 0, 0
        self._timers: list[threading.Timer] = []
        if not at_step:
            self._arm()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseEvent):
            self.phase = {"look": "starting"}.get(event.phase, event.phase)
        if isinstance(event, SavedEvent):
            self.saved = max(self.saved, event.step)
        if isinstance(event, StepEvent):
            self.last_step = event.step
            if event.step == self._at_step:
                self._arm()

    def _arm(self) -> None:
        self._timers.append(threading.Timer(self._after, self._kill))
        self._timers[-1].start()

    def _kill(self) -> None:
        process = workers().get(self.rank)
        if process is not None:
            process.kill()
            self.killed = True

    def over(self) -> None:
        for timer in self._timers:
            timer.cancel()
            timer.join()


def attempt(model: Path, out: Path, killer: Killer) -> nbqlora.Run | None:
    """The rest of a run, killed or done; everything that must hold behind a kill is checked."""
    before, began = listening(), time.monotonic()
    try:
        return nbqlora.finetune(
            model=str(model), data=tiny.make_rows(12), output_dir=str(out), resume=True, observe=killer, **OPTIONS
        )
    except TrainingError as error:
        found = re.match(REASON, str(error))
        assert killer.killed and found and int(found[1]) == killer.rank, f"{error}\n{error.__notes__}"
        if 0 < killer.saved < STEPS:
            assert f"to go on after step {killer.saved} of {STEPS}" in str(error), error
        print(f"  {killer.phase} after step {killer.last_step}: {time.monotonic() - began:.1f} s", file=sys.stderr)
        return None
    finally:
        killer.over()
        assert workers() == {}, "a worker is left"
        assert listening() <= before, "a port is left"


def check_saved(out: Path, killer: Killer) -> None:
    """What was told to be saved is there and whole."""
    found, unreadable = find_checkpoints(out / CHECKPOINTS_FOLDER)
    best, damaged = first_whole(found)
    assert not unreadable and not damaged, (unreadable, damaged)
    assert (0 if best is None else best.step) >= killer.saved, "a checkpoint is lost"


def run(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Kill so many times, and see every chain to its end."""
    numbers, counts = random.Random(seed), Counter[str]()
    model = tiny.save_model(folder / "model")
    never = Killer(0, STEPS + 1, 0.0)
    whole = attempt(model, folder / "whole", never)
    assert whole is not None and never.last_step == STEPS
    expected, losses = adapter(whole), [e.loss for e in whole.report.steps]
    done, chains = 0, 0
    while done < kills or not chains:
        out, run_ = folder / f"chain{chains}", None
        saved = 0
        while run_ is None:
            early = numbers.random() < 1 / 3
            at_step = 0 if early else numbers.randint(saved + 1, STEPS)
            after = numbers.uniform(0, STARTING_SECONDS if early else AROUND_A_STEP_SECONDS)
            killer = Killer(numbers.randrange(N), at_step if done < kills else STEPS + 1, after)
            run_ = attempt(model, out, killer)
            done += run_ is None
            counts[killer.phase] += run_ is None
            check_saved(out, killer)
            saved = min(max(saved, killer.saved), STEPS - 1)
        assert [e.loss for e in run_.report.steps] == losses
        assert adapter(run_) == expected, "the adapter differs"
        chains += 1
    return {"kills": done, "chains": chains, **counts}


def adapter(run_: nbqlora.Run) -> bytes:
    return (run_.adapter_dir / "adapter_model.safetensors").read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(asked.kills, asked.seed, Path(folder))))


if __name__ == "__main__":
    main()
