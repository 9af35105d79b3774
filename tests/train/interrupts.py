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
    """Whatever a test does, signals are handled afterwards as they were before."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(n) for n in numbers]
    yield before[0]
    after = [signal.getsignal(n) for n in numbers]
    for number, former in zip(numbers, before, strict=True):
        signal.signal(number, former)
    assert after == before


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
