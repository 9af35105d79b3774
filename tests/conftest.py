"""Shared by all tests: no network but pip's, no live output, one tiny model a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
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
