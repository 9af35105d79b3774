"""Runs that are killed with SIGKILL at random moments, resumed, and compared bit for bit with one that was not.

A fork server: this process imports everything once and computes nothing; each attempt is a fork of it that
calls ``nbqlora.finetune(..., resume=True)`` and tells its events through a pipe. Half of the kills come at a
random time of the attempt's life, half within the milliseconds after a step, when its checkpoint is written.

    python -m tests.run.kills --kills 1000 --seed 3
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import select
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401
import torch

import nbqlora
import nbqlora.run.steps
import nbqlora.train.trainer
from nbqlora.core.events import EvalEvent, Event, PhaseEvent, SavedEvent, StepEvent
from tests import tiny

COMMON: dict[str, Any] = {"max_length": 96, "learning_rate": 1e-2, "lora_dropout": 0.1, "num_train_epochs": 3}
PADDED = {"packing": False, "padding_free": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulation, partial last steps, evaluations": {
        **PADDED, "lora_r": 4, "effective_batch_size": 4, "per_device_train_batch_size": 1, "warmup_ratio": 0.2,
        "eval_data": 3,
    },
    "packs": {"lora_r": 4, "packing": True, "effective_batch_size": 2, "per_device_train_batch_size": 1},
    "8-bit optimizer": {**PADDED, "lora_r": 32, "effective_batch_size": 4, "optim": "adamw_8bit"},
    "rows end to end, noise on embeddings": {
        "lora_r": 4, "packing": False, "effective_batch_size": 3, "optim": "adamw_torch", "lr_scheduler_type": "cosine",
        "trl": {"neftune_noise_alpha": 5.0},
    },
}  # fmt: skip
# Every step, or when it happens to be due.
SAVE_MINUTES = (1e-9, 0.06 / 60)
WRITING_SECONDS = 0.03


@dataclass
class Attempt:
    """One forked run."""

    pid: int
    pipe: int
    begun: float
    kill_at: float
    kill_after_step: int
    lines: list[list[str]] = field(default_factory=list)
    rest: bytes = b""
    killed: bool = False

    def read(self) -> bool:
        """Take what it told; False when it tells nothing more."""
        told = os.read(self.pipe, 1 << 16)
        *whole, self.rest = (self.rest + told).split(b"\n")
        for line in whole:
            self.lines.append(line.decode().split(" "))
            if self.lines[-1][:1] == ["step"] and self.kill_after_step == (step := int(self.lines[-1][1])):
                self.kill_at = time.monotonic() + random.Random(self.pid * step).uniform(0, WRITING_SECONDS)
        return bool(told)

    def steps(self) -> dict[int, list[str]]:
        return {int(line[1]): line[2:] for line in self.lines if line[0] == "step"}

    def evals(self) -> dict[int, list[str]]:
        return {int(line[1]): line[2:] for line in self.lines if line[0] == "eval"}


def fork(work: Callable[[Callable[[str], None]], None], log: Path, kill_at: float, kill_after_step: int) -> Attempt:
    """Run ``work`` in a fork; it is given a function that tells a line."""
    ours, theirs = os.pipe()
    begun = time.monotonic()
    pid = os.fork()
    if pid:
        os.close(theirs)
        return Attempt(pid, ours, begun, begun + kill_at, kill_after_step)
    try:
        os.close(ours)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        work(lambda line: (os.write(theirs, line.encode() + b"\n"), None)[1])
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def train(setting: str, save_minutes: float, model: Path, out: Path, tell: Callable[[str], None]) -> None:
    """One whole run, or what is left of it."""

    def observe(event: Event) -> None:
        match event:
            case PhaseEvent():
                tell(f"phase {event.phase}")
            case StepEvent():
                tell(f"step {event.step} {event.loss.hex()} {event.grad_norm.hex()} {event.learning_rate.hex()}")
            case EvalEvent():
                tell(f"eval {event.step} {event.loss.hex()}")
            case SavedEvent():
                tell(f"saved {event.step}")

    options = {**COMMON, **SETTINGS[setting], "model": str(model), "output_dir": str(out)}
    if "eval_data" in options:
        options["eval_data"] = tiny.make_rows(options["eval_data"], seed=1)
    nbqlora.finetune(data=tiny.make_rows(10), save_minutes=save_minutes, resume=True, observe=observe, **options)


class Lane:
    """One chain of attempts after the other, each chain a run that is killed until it is done."""

    def __init__(self, number: int, seed: int, folder: Path, model: Path, counts: Counter[str]) -> None:
        self._random = random.Random(seed * 100 + number)
        self._folder, self._model, self._counts = folder / f"lane{number}", model, counts
        self._references: dict[str, tuple[Attempt, float, bytes]] = {}
        self._chains = number
        self._folder.mkdir()

    def work(self) -> Iterator[Attempt]:
        """Attempts, one by one; each is over when the next is asked for."""
        names = list(SETTINGS)
        while True:
            setting, save = names[self._chains % len(names)], self._random.choice(SAVE_MINUTES)
            if setting not in self._references:
                yield from self._reference(setting)
            yield from self._chain(setting, save, self._folder / f"chain{self._chains}")
            self._chains += 2

    def _reference(self, setting: str) -> Iterator[Attempt]:
        out = self._folder / f"reference{self._chains}"
        attempt = self._fork(setting, 0, out, 1e9, 0)
        yield attempt
        took = time.monotonic() - attempt.begun
        assert len(attempt.steps()) >= 9, (self._folder / "log").read_text()
        self._references[setting] = (attempt, took, adapter(out))

    def _chain(self, setting: str, save: float, out: Path) -> Iterator[Attempt]:
        reference, took, expected = self._references[setting]
        evals: dict[int, list[str]] = {}
        saved = 0
        while True:
            left = range(saved + 1, len(reference.steps()) + 1)
            at_step = self._random.choice(left) if left and self._random.random() < 0.5 else 0
            attempt = self._fork(setting, save, out, 1e9 if at_step else self._random.uniform(0, took), at_step)
            yield attempt
            steps = attempt.steps()
            assert steps.items() <= reference.steps().items(), (setting, steps, reference.steps())
            assert attempt.evals().items() <= reference.evals().items(), (setting, attempt.evals())
            assert not steps or min(steps) > saved, f"{setting}: step {min(steps)} again, {saved} was saved"
            evals |= attempt.evals()
            saved = max([saved, *(int(line[1]) for line in attempt.lines if line[0] == "saved")])
            if attempt.killed:
                self._counts[where(attempt, out)] += 1
                continue
            assert adapter(out) == expected, f"{setting}: the adapter differs"
            check_record(out, reference, evals)
            self._counts["chains"] += 1
            return

    def _fork(self, setting: str, save: float, out: Path, kill_at: float, kill_after_step: int) -> Attempt:
        work = lambda tell: train(setting, save, self._model, out, tell)  # noqa: E731
        return fork(work, self._folder / "log", kill_at, kill_after_step)


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


def check_record(out: Path, reference: Attempt, evals: dict[int, list[str]]) -> None:
    """The record of a killed run reads as that of one that was not, and nothing is left over."""
    events = json.loads((out / "run.json").read_text())["events"]
    told = [(e["step"], float(e["loss"]).hex()) for e in events if e["kind"] == "StepEvent"]
    assert told == [(step, figures[0]) for step, figures in reference.steps().items()]
    told = [(e["step"], [float(e["loss"]).hex()]) for e in events if e["kind"] == "EvalEvent"]
    assert told == list(reference.evals().items())
    assert evals == reference.evals()
    assert not list(out.rglob(".saving-*"))
    assert 1 <= len(list((out / "checkpoints").iterdir())) <= 2


def where(attempt: Attempt, out: Path) -> str:
    """What a killed attempt was doing: by what it left on the disk, else by what it told last."""
    if list((out / "checkpoints").glob(".saving-*")):
        return "writing a checkpoint"
    if list(out.glob(".saving-*")):
        return "saving the adapter"
    phases = [line[1] for line in attempt.lines if line[0] == "phase"]
    return {"look": "looking", "load": "loading", "train": "training", "save": "ending"}.get(
        phases[-1] if phases else "", "starting"
    )


def run(kills: int, seed: int, folder: Path, lanes: int = 2) -> dict[str, Any]:
    """Kill so often; returns how many kills hit what.

    Raises:
        AssertionError: something was not the same as without kills.
    """
    counts: Counter[str] = Counter()
    made = fork(lambda tell: (tiny.save_model(folder / "model"), None)[1], folder / "log", 1e9, 0)
    assert os.waitpid(made.pid, 0)[1] == 0, (folder / "log").read_text()
    works = [Lane(i, seed, folder, folder / "model", counts).work() for i in range(lanes)]
    live = {work: next(work) for work in works}
    begun = time.monotonic()
    try:
        while sum(counts.values()) - counts["chains"] < kills:
            step(live, folder)
    finally:
        for attempt in live.values():
            os.kill(attempt.pid, signal.SIGKILL)
            os.waitpid(attempt.pid, 0)
    done = sum(counts.values()) - counts["chains"]
    return {"kills": done, "seconds": round(time.monotonic() - begun, 1), **dict(sorted(counts.items()))}


def step(live: dict[Iterator[Attempt], Attempt], folder: Path) -> None:
    """Wait for the next thing to happen, and let it."""
    wait = max(0.0, min(a.kill_at for a in live.values()) - time.monotonic())
    readable, _, _ = select.select([a.pipe for a in live.values()], [], [], min(wait, 60))
    for work, attempt in list(live.items()):
        over = attempt.pipe in readable and not attempt.read()
        if not over and time.monotonic() >= attempt.kill_at:
            os.kill(attempt.pid, signal.SIGKILL)
            while attempt.read():
                pass
            over = True
        if over:
            os.close(attempt.pipe)
            status = os.waitpid(live.pop(work).pid, 0)[1]
            attempt.killed = os.WIFSIGNALED(status)
            assert attempt.killed or status == 0, "".join(p.read_text() for p in folder.rglob("log"))[-4000:]
            live[work] = next(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    gc.collect()
    gc.freeze()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(asked.kills, asked.seed, Path(folder))))


if __name__ == "__main__":
    sys.exit(main())
