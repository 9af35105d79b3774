"""The one owner of a loaded model, so that letting go of it is one call.

A ``Run`` holds its model only through a session; nothing else refers to it. Starting a run frees the
sessions of finished ones, and an error clears the frames that it went through before it is shown:
IPython keeps the last traceback in several places, and with it every local of every frame.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import traceback
import weakref

import torch

from nbqlora.engine.loaded import LoadedModel

_live: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Holds one loaded model, or nothing."""

    def __init__(self) -> None:
        self.loaded: LoadedModel | None = None
        _live.add(self)

    def free(self) -> None:
        """Let go of the model and give the memory back to the card."""
        if self.loaded is None:
            return
        self.loaded = None
        collect()


def free_all() -> None:
    """Let go of every model that an earlier run still holds."""
    for session in list(_live):
        session.free()


def collect() -> None:
    """Collect cycles, then hand cached blocks back to the card, and free pages to the system where libc can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def clear_frames(error: BaseException) -> None:
    """Drop the locals of the frames that an error, and what led to it, left behind: they keep the model alive."""
    chain, seen = [error], set[int]()
    while chain:
        one = chain.pop()
        if id(one) not in seen:
            seen.add(id(one))
            traceback.clear_frames(one.__traceback__)
            chain += [e for e in (one.__cause__, one.__context__) if e is not None]
