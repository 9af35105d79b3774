"""For modules that ask for it: one thread and a small heap, as in ``tests/train``."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Threads wait for each other on a busy machine; each run collects four times, 0.3 s over all that is imported."""
    import nbqlora.train.trainer  # noqa: F401

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)
