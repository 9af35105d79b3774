"""Real signals for tests, and the promise that every test leaves the handlers as they were."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from nbqlora.core.events import StepEvent
from tests import tiny

ROWS = tiny.make_rows(12)


@pytest.fixture(autouse=True)
def handler() -> Iterator[Any]:
    """Signals as in a terminal, also where pytest runs with them ignored; a test leaves them as they are then."""
    numbers, usual = (signal.SIGINT, signal.SIGTERM), [signal.default_int_handler, signal.SIG_DFL]
    before = [signal.signal(n, handled) for n, handled in zip(numbers, usual, strict=True)]
    yield usual[0]
    after = [signal.signal(n, former) for n, former in zip(numbers, before, strict=True)]
    assert after == usual


def interrupt(number: int = signal.SIGINT) -> None:
    """As the terminal or ipykernel does it: from outside the main thread."""
    thread = threading.Thread(target=os.kill, args=(os.getpid(), number))
    thread.start()
    thread.join()


class After:
    """Interrupts when a step is told."""

    def __init__(self, step: int, by: Callable[[], None] = interrupt) -> None:
        self.step, self.by = step, by
        self.events: list[Any] = []

    def __call__(self, event: Any) -> None:
        self.events.append(event)
        if isinstance(event, StepEvent) and event.step == self.step:
            self.by()
