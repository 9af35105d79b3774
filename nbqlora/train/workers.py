"""Data workers that outlive an interrupt.

A terminal's Ctrl-C and ipykernel's interrupt signal the whole process group, so data workers are hit too.
torch's die of it, and the step that should have been finished fails with "DataLoader worker exited
unexpectedly". Here they ignore SIGINT from their first line, and while they start, which takes a spawned one
the seconds of importing torch, they inherit a mask that blocks it.

SIGTERM is left alone: torch and multiprocessing end workers with it, and one that ignores it keeps its parent
from exiting. So a SIGTERM to the whole group ends a run that has workers with an error, and the last
checkpoint is what is left of it.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from functools import partial
from multiprocessing.context import BaseContext, ForkProcess, ForkServerProcess, SpawnProcess
from multiprocessing.process import BaseProcess
from typing import Any


def shield_workers(loader: Any) -> Any:
    """Change a loader of accelerate in place, and return it: its workers, if it has any, ignore interrupts."""
    inner = loader.base_dataloader
    if inner.num_workers:
        asked = inner.multiprocessing_context or multiprocessing.get_context()
        inner.multiprocessing_context = _context(asked.get_start_method())
        inner.worker_init_fn = partial(_begin, then=inner.worker_init_fn)
    return loader


def _begin(worker_id: int, then: Callable[[int], None] | None) -> None:
    """First lines of a worker. A fork server that already ran has no mask to inherit."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(worker_id)


class _Masked(BaseProcess):
    """Starts with SIGINT blocked; this process gets one that came meanwhile right after."""

    def start(self) -> None:
        """As it is, under the mask."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Fork(_Masked, ForkProcess):
    pass


class _Spawn(_Masked, SpawnProcess):
    pass


class _ForkServer(_Masked, ForkServerProcess):
    pass


_PROCESSES = {"fork": _Fork, "spawn": _Spawn, "forkserver": _ForkServer}


def _context(method: str) -> BaseContext:
    """A context of its own, so that Python's shared one stays as it is."""
    context: Any = type(multiprocessing.get_context(method))()
    context.Process = _PROCESSES[method]
    return context
