"""One thread and a small heap: tiny runs spend their time on neither arithmetic nor the collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def quick_runs() -> Iterator[None]:
    """Threads wait for each other on a busy machine; each run collects four times, 0.3 s over all that is imported."""
    import nbqlora.train.trainer  # noqa: F401

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)
