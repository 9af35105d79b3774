"""The stop that keeps the work: the first interrupt finishes the step, the second one raises.

The handler is installed only while training and only in the main thread (Python allows it nowhere else);
ipykernel 6.17 to 7.4, a shell's Ctrl-C and ``kill -INT`` all arrive as SIGINT. The former handler is put
back in a ``finally``: Trainer's ``on_train_end`` is skipped on exceptions.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from types import FrameType
from typing import Any

INTERRUPTED = "interrupted"
TIME_IS_UP = "max_minutes reached"


class Stop:
    """Asked between steps whether to go on; a context manager around the training loop.

    Args:
        max_minutes: stop after this long, counted from entering; None for no limit.
        on_request: called once, from the signal handler, when the first interrupt arrives.
    """

    def __init__(self, max_minutes: float | None = None, on_request: Callable[[], None] | None = None) -> None:
        self._limit_seconds = None if max_minutes is None else max_minutes * 60
        self._on_request = on_request
        self._reason = ""
        self._begun = monotonic()
        self._former: Any = None
        self._installed = False

    @property
    def reason(self) -> str:
        """Why the run should end after this step; ``""`` to go on."""
        if not self._reason and self._limit_seconds is not None and monotonic() - self._begun >= self._limit_seconds:
            self._reason = TIME_IS_UP
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a stop after the current step."""
        self._reason = self._reason or reason

    def __enter__(self) -> Stop:
        self._begun = monotonic()
        if threading.current_thread() is threading.main_thread():
            self._former = signal.signal(signal.SIGINT, self._handle)
            self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, self._former if self._former is not None else signal.SIG_DFL)
            self._installed = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._reason == INTERRUPTED:
            raise KeyboardInterrupt
        self._reason = INTERRUPTED
        if self._on_request is not None:
            # Python refuses a print within a print, and this may come within one.
            with suppress(RuntimeError):
                self._on_request()
