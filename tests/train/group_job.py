"""Runs with data workers whose whole process group is signalled, as a terminal and ipykernel do it.

A process of its own, leader of its group, since the signals reach everybody in it. Prints one JSON line a run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

SERVICES = ("from multiprocessing.resource_tracker", "from multiprocessing.forkserver")
PATIENCE_SECONDS = 60


def workers() -> list[psutil.Process]:
    """Processes below this one that live, but for multiprocessing's own services, which stay."""
    return [p for p in psutil.Process().children(recursive=True) if _works(p)]


def _works(process: psutil.Process) -> bool:
    try:
        # What a fork server forks has the server's command line.
        command = " ".join(process.cmdline()) if process.ppid() == os.getpid() else ""
        return process.status() != psutil.STATUS_ZOMBIE and not any(name in command for name in SERVICES)
    except psutil.NoSuchProcess:
        return False


def signal_group(number: int) -> None:
    """From outside the main thread, to this process and all its children."""
    thread = threading.Thread(target=os.killpg, args=(0, number))
    thread.start()
    thread.join()


def when_workers_start(act: Callable[[], None]) -> None:
    """Act as soon as a worker is there: a spawned one is then at its first imports."""

    def watch() -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while not workers() and time.monotonic() < until:
            time.sleep(0.005)
        act()

    threading.Thread(target=watch).start()


class Signaller:
    """Signals at a moment.

    Args:
        at: ``"start"`` of the workers, or ``"step"``, the end of the first one.
        times: 2 for another as soon as the first is taken.
    """

    def __init__(self, at: str, number: int, times: int) -> None:
        self._at, self._number, self._times = at, number, times
        self.n_workers = 0

    def __call__(self, event: Any) -> None:
        kind, phase = type(event).__name__, getattr(event, "phase", "")
        if kind == "StepEvent":
            self.n_workers = max(self.n_workers, len(workers()))
        if self._at == "start" and phase == "train":
            when_workers_start(self._act)
        if (self._at == "step" and kind == "StepEvent" and event.step == 1) or (phase == "stop" and self._times):
            self._act()

    def _act(self) -> None:
        if self._times:
            self._times -= 1
            signal_group(self._number)


def run(model: str, out: Path, method: str, n_workers: int, at: str, number: int, times: int) -> dict[str, Any]:
    """One run; what became of it."""
    import nbqlora
    from tests import tiny

    multiprocessing.set_start_method(method, force=True)
    observe = Signaller(at, number, times)
    said: dict[str, Any] = {}
    try:
        done = nbqlora.finetune(
            model=model, data=tiny.make_rows(160), output_dir=str(out), max_length=96, packing=False, max_steps=1000,
            per_device_train_batch_size=1, gradient_accumulation_steps=2 if times == 1 else 40, observe=observe,
            trl={"dataloader_num_workers": n_workers},
        )  # fmt: skip
        said = {"status": done.status, "reason": done.report.reason}
    except BaseException as error:
        said = {"error": f"{type(error).__name__}: {error}"}
    saved = (out / "adapter" / "adapter_model.safetensors").is_file()
    handled = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return {**said, "saved": saved, "workers": observe.n_workers, "left": len(workers()), "handler_is_back": handled}


def seed(worker_id: int) -> None:
    """A loader's own beginning of a worker; here, where a spawned worker imports little to find it."""
    import torch

    torch.manual_seed(1000 + worker_id)


def with_seed(rows: list[Any]) -> tuple[int, int]:
    """The batch's first row, and what the worker's beginning left."""
    import torch

    return int(rows[0][0]), torch.initial_seed()


def main(model: str, out: str, jobs: str) -> None:
    """All jobs, one after another, so that the libraries are imported once."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it
    for i, job in enumerate(json.loads(jobs)):
        print(json.dumps(run(model, Path(out) / str(i), *job)), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
