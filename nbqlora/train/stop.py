"""The stop that keeps the work: the first interrupt finishes the step, the second one raises.

ipykernel 6.17 to 7.4, a shell's Ctrl-C and ``kill -INT`` all arrive as SIGINT; ``docker stop``, ``timeout``
and batch systems send SIGTERM, which counts the same where nobody else handles it. Handlers stand only from
the first step to the last file, and only in the main thread (Python allows them nowhere else). A SIGINT that
the process was told to ignore (``nbqlora finetune job.toml &`` in a script) stays ignored, and one that is
handled below Python is left alone, since Python could not put it back.

What must not be cut in two, the optimizer's step and the saving of files, is *held*: a second interrupt waits
for its end, and only a third one breaks in.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from statistics import fmean
from time import monotonic
from types import FrameType
from typing import Any

INTERRUPTED = "interrupted"
TERMINATED = "terminated"
TIME_IS_UP = "max_minutes reached"
STEPS_COUNTED = 5


class EvaluationCutError(Exception):
    """An evaluation ends unfinished because a stop was asked for; never leaves the trainer."""


class Stop:
    """Asked between steps whether to go on; a context manager around training and saving.

    Args:
        max_minutes: stop before ``clock`` passes this; None for no limit.
        on_request: called once, from the signal handler, when the first interrupt arrives.
        clock: seconds on the clock that ``max_minutes`` limits: since the cell was run, for a user thinks of
            the hour of a class or a session, and downloads count there too. None counts from here.
    """

    def __init__(
        self,
        max_minutes: float | None = None,
        on_request: Callable[[], None] | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        begun = monotonic()
        self._clock = clock or (lambda: monotonic() - begun)
        self._limit_seconds = None if max_minutes is None else max_minutes * 60
        self._on_request = on_request
        self._recent_seconds: deque[float] = deque(maxlen=STEPS_COUNTED)
        self._reason = ""
        self._interrupted = self._held = self._late = False
        self._former: dict[int, Any] = {}
        self._pid = os.getpid()

    @property
    def reason(self) -> str:
        """Why the run should end after this step; ``""`` to go on."""
        if not self._reason and self._limit_seconds is not None:
            next_step = fmean(self._recent_seconds) if self._recent_seconds else 0.0
            if self._clock() + next_step > self._limit_seconds:
                self._reason = TIME_IS_UP
        return self._reason

    def request(self, reason: str) -> None:
        """Ask for a stop after the current step."""
        self._reason = self._reason or reason

    def step_done(self, seconds: float) -> None:
        """A step took this long, so the next one must find as much time left."""
        self._recent_seconds.append(seconds)

    def hold(self) -> None:
        """From here on a second interrupt waits."""
        self._held = True

    def release(self) -> None:
        """Let interrupts through again. Raises KeyboardInterrupt for one that waited."""
        self._held, late, self._late = False, self._late, False
        if late:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold interrupts over a block; an error of the block itself goes before one that waited."""
        self.hold()
        try:
            yield
        except BaseException:
            self._held = self._late = False
            raise
        self.release()

    def __enter__(self) -> Stop:
        self._pid = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                former = signal.getsignal(number)
                if former is signal.SIG_DFL or (number == signal.SIGINT and callable(former)):
                    self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        self._held = True
        while self._former:
            signal.signal(*self._former.popitem())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            _in_a_forked_process(number)
        elif not self._interrupted:
            self._interrupted, self._reason = True, TERMINATED if number == signal.SIGTERM else INTERRUPTED
            if self._on_request is not None:
                # Python refuses a print within a print, and this may come within one.
                with suppress(RuntimeError):
                    self._on_request()
        elif self._held and not self._late:
            self._late = True
        else:
            raise KeyboardInterrupt


def _in_a_forked_process(number: int) -> None:
    """A fork inherits the handler. A stop is the parent's to make, but whoever ends this process must succeed."""
    if number == signal.SIGTERM:
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
