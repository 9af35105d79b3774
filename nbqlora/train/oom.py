"""Out of memory, recognized and cleaned up after.

An error that is raised where memory ran out holds every frame that it went through, and with them the tensors that
filled the card: a retry inside the ``except`` block would find it as full as before. So an attempt's error is turned
into plain values, its frames are cleared, and whoever decides what to do next is called when nothing of it is left.

What counts: torch's own error for a card, and those errors of CUDA, cuBLAS, cuDNN and Triton that say that memory could
not be had (they are ``RuntimeError`` too, so their text decides); on a host ``MemoryError`` and torch's CPU allocator.
A capture that is broken off can end in an error about the capture, with the real one as its context.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType
from typing import TypeVar

import torch

from nbqlora.core.errors import NbqloraError, clear_frames
from nbqlora.memory.workspaces import free_workspaces

T = TypeVar("T")

FORWARD, BACKWARD, OPTIMIZER, EVAL, PROBE = "forward", "backward", "optimizer", "eval", "probe"
ON_A_CARD = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "[CUDA]: out of memory",
)
ON_A_HOST = "DefaultCPUAllocator: can't allocate memory"
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ([KMG]iB|bytes)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """Memory that could not be had, as plain values.

    Args:
        phase: where: forward, backward, optimizer, eval; probe for a peak that was measured there, above the limit.
        asked_bytes: what the allocation asked for; None when it is not known.
        on_host: it is the host's memory that ran out.
        capturing: a step was being captured.
        tokens: of the part of a micro-batch that was at work; 0 where there is none.
        n_documents: in that part.
    """

    phase: str
    asked_bytes: int | None
    on_host: bool = False
    capturing: bool = False
    tokens: int = 0
    n_documents: int = 0

    def at(self, **where: int | bool) -> Shortage:
        """The same, with what only the caller knows."""
        return replace(self, **where)  # type: ignore[arg-type]


def attempt(work: Callable[[], T], device: torch.device, *, phase: str = "") -> T | Shortage:
    """Do it; where memory runs out, the values of that, with nothing left that the work held.

    Args:
        phase: what it is; "" for a micro-batch, whose traceback says whether it was in its backward.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    try:
        return work()
    except (MemoryError, RuntimeError) as error:
        found = out_of_memory(error)
        if found is None:
            raise
        shortage = _shortage(found, phase or (BACKWARD if _in_backward(error) else FORWARD))
        clear_frames(error)
    if stream is not None:
        torch.cuda.set_stream(stream)  # a capture that ended in an error leaves its own
        torch.cuda.synchronize(device)  # what was launched before still reads what is about to be dropped
    return shortage


def asked_bytes(error: BaseException) -> int | None:
    """What the allocation that failed asked for, where its text says it."""
    found = _ASKED.search(str(error))
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def give_back(device: torch.device) -> None:
    """Collect what nobody refers to, and give cached memory back to the card."""
    gc.collect()
    if device.type == "cuda":
        free_workspaces()
        torch.cuda.empty_cache()


def out_of_memory(error: BaseException) -> BaseException | None:
    """Of this error and what led to it, the one that is memory which could not be had; None where none is."""
    return next((e for e in _chain(error) if _says_so(e)), None)


def _says_so(error: BaseException) -> bool:
    if isinstance(error, NbqloraError):  # the end of somebody's search for memory, not its beginning
        return False
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in (*ON_A_CARD, ON_A_HOST))


def _shortage(error: BaseException, phase: str) -> Shortage:
    on_host = isinstance(error, MemoryError) or ON_A_HOST in str(error)
    return Shortage(phase=phase, asked_bytes=asked_bytes(error), on_host=on_host)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it came of."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or now.__context__


def _in_backward(error: BaseException) -> bool:
    code = torch.autograd.backward.__code__
    return any(tb.tb_frame.f_code is code for e in _chain(error) for tb in _traceback(e.__traceback__))


def _traceback(first: TracebackType | None) -> Iterator[TracebackType]:
    while first is not None:
        yield first
        first = first.tb_next
