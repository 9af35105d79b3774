"""The one owner of a loaded model, so that letting go of it is one call.

A ``Run`` holds its model only through a session; nothing else refers to it. Starting a run frees the
sessions of finished ones, and an error clears the frames that it went through before it is shown:
IPython keeps the last traceback in several places, and with it every local of every frame. A frame that was cleared
still keeps its function, and a function its closure: torch calls a module with hooks through one that holds the
module. So the modules of a model that is let go of are emptied, and who still holds one holds no memory.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import weakref

import torch

from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.optimize import restore
from nbqlora.memory.workspaces import free_workspaces

_live: weakref.WeakSet[Session] = weakref.WeakSet()


class Session:
    """Holds one loaded model, or nothing.

    Args:
        name: the run's.
        busy: the run is under way: nobody else may let go of its model.
    """

    def __init__(self, name: str = "", *, busy: bool = False) -> None:
        self.name, self.busy = name, busy
        self.loaded: LoadedModel | None = None
        _live.add(self)

    def free(self) -> None:
        """Let go of the model and give the memory back to the card."""
        if self.loaded is None:
            return
        _empty(self.loaded)
        self.loaded = None
        collect()


def _empty(loaded: LoadedModel) -> None:
    """Take everything out of the model's modules: parameters, buffers, scales of 4-bit weights, hooks."""
    loaded.release()
    restore(loaded.model, own_storage=False)
    for module in list(loaded.model.modules()):
        vars(module).clear()


def finished() -> list[Session]:
    """The models of runs that are over, by the order of their names."""
    return sorted((s for s in _live if s.loaded is not None and not s.busy), key=lambda s: s.name)


def free_all() -> None:
    """Let go of every model that an earlier run still holds."""
    for session in list(_live):
        session.free()


def free_pages() -> None:
    """Pages that the C library keeps of freed memory go back to the system, where it can; a few milliseconds."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def collect() -> None:
    """Collect cycles, then hand cached blocks back to the card, and free pages to the system where libc can."""
    gc.collect()
    free_pages()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
        free_workspaces()
        torch.cuda.empty_cache()
