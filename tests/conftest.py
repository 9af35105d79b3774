"""Shared by all tests: no network but pip's, no live output, one tiny model a session."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if not torch.cuda.is_available():
    # Read when a kernel is declared: without a card, Triton's interpreter runs it.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("NBQLORA_DISPLAY", "static")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with tokenizer and chat template, as a model's folder."""
    from tests.tiny import save_model

    return save_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, object]]:
    """Twelve conversations."""
    from tests.tiny import make_rows

    return make_rows(12)


@pytest.fixture
def use_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Points the hub's client to an address, with a cache of its own."""
    from tests.hub.hub_server import point_to

    return lambda address: point_to(address, tmp_path / "hf", monkeypatch)


@pytest.fixture
def hub(use_hub: Callable[[str], None], tiny_folder: Path) -> Iterator[str]:
    """Address of a hub on this machine that has the tiny model."""
    from tests.hub.hub_server import hub_server

    with hub_server(tiny_folder) as address:
        use_hub(address)
        yield address
