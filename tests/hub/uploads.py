"""Fixtures of uploads: a hub, and folders that could be published to it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from nbqlora.hub.save import save_adapter
from tests import tiny
from tests.hub.hub_server import point_to
from tests.hub.upload_server import Store, upload_server


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points the client to an address, by the protocol that needs no service beside the hub."""
    for variable in ("KAGGLE_KERNEL_RUN_TYPE", "COLAB_GPU", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return lambda address: point_to(address, tmp_path / "hf", monkeypatch)


@pytest.fixture
def store(tmp_path: Path, use: Callable[[str], None]) -> Iterator[Store]:
    with upload_server(tmp_path / "hub") as (address, held):
        use(address)
        yield held


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter for a model of the hub."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny.with_lora(tiny.make_model())
    return Path(save_adapter(model, tiny.make_tokenizer(), folder, "org/base").path)


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """Such a folder, with what may lie beside an adapter's files."""
    folder = tmp_path / "run1/adapter"
    shutil.copytree(saved, folder)
    for name in (
        "optimizer.safetensors",
        "state.json",
        "training.log",
        "run.json",
        ".env",
        "checkpoints/step-1/a.json",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def merged(tiny_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_folder, tmp_path / "merged")
