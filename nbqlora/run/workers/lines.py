"""What a worker and the process that started it say to each other, as values on one line.

The line is a pair of sockets that only these two processes hold, so values are pickled, as multiprocessing does it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nbqlora.core.errors import NbqloraError
    from nbqlora.core.events import Event
    from nbqlora.core.report import Report


@dataclass(frozen=True, kw_only=True)
class Do:
    """To a worker: call this.

    Args:
        what: a pickled function, opened by the thread that calls it, since that may import for seconds.
    """

    what: bytes


@dataclass(frozen=True, kw_only=True)
class Interrupt:
    """To a worker: one interrupt, by its number (SIGINT, SIGTERM)."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Told:
    """From a worker: something happened."""

    event: Event


@dataclass(frozen=True, kw_only=True)
class Done:
    """From a worker: its run ended well."""

    report: Report


@dataclass(frozen=True, kw_only=True)
class Failed:
    """From a worker: its run ended with an error.

    Args:
        error: the error itself where it is one of ours; None for any other, which another process may not know.
        text: its kind and message.
        trace: its whole traceback.
    """

    error: NbqloraError | None
    text: str
    trace: str
