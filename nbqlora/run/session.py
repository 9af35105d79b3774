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
from types import TracebackType

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


def clear_frames(trace: TracebackType | None) -> None:
    """Drop the locals of frames that an error left behind: they would keep the model alive."""
    traceback.clear_frames(trace)
