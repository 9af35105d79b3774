"""For modules that ask for it: one thread and a small heap, as in ``tests/train``, and a run with checkpoints."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import nbqlora
from tests import tiny
from tests.run.resuming import EVERY_STEP, finetune, until


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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model's folder."""
    return tiny.save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def whole(quick: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> nbqlora.Run:
    """Nine steps with a checkpoint after each."""
    return finetune(model, tmp_path_factory.mktemp("whole"), **EVERY_STEP)


@pytest.fixture
def killed(whole: nbqlora.Run, tmp_path: Path) -> Callable[[int], Path]:
    """Makes the folder of a run that was killed after a step."""
    return lambda step: until(step, whole.adapter_dir.parent, tmp_path / f"killed{step}")
