"""For modules that ask for it: one thread and a small heap, as in ``tests/train``, and a run with checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import nbqlora
from tests import tiny
from tests.quick import quick_runs
from tests.run.resuming import EVERY_STEP, finetune, until


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """See :func:`tests.quick.quick_runs`."""
    with quick_runs():
        yield


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
