"""A call in a thread of its own, beside what its caller does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """A call in another thread, which nobody waits for when the process ends: it may wait for a rank that is gone."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = call
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="nbqlora-beside", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Waits until it is done. Raises what it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._result[0]
