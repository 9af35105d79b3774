"""Shared by the tests on a card."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def medium_folder(tmp_path_factory) -> Path:
    """Large enough that activations, not constants, decide the peak."""
    from tests.tiny import save_model

    shape = {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32000, "max_position_embeddings": 4096, "initializer_range": 0.02,
    }  # fmt: skip
    return save_model(tmp_path_factory.mktemp("medium"), **shape)
