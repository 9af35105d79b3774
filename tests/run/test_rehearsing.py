"""What a run's options say of the layer that is rehearsed, and what is said where it fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.ranks import ALONE, Rank
from nbqlora.core.request import CellRequest
from nbqlora.hub.nearby import nearby_config
from nbqlora.run.rehearsing import rehearsal_for, rehearse
from nbqlora.run.tables import table_fields
from tests import tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def config(model: object, **changes: Any) -> FinetuneConfig:
    options = {"model": str(model), "data": [], **changes}
    return validate(CellRequest(options=options), table_fields=table_fields)


def test_a_runs_layer(folder: Path) -> None:
    found = rehearsal_for(config(folder, lora_r=3, dtype="bf16", target_modules=["q_proj", "v_proj"]), CPU)
    assert found is not None
    assert (found.dtype, found.in_4bit, found.lora_r, found.adapted) == (torch.bfloat16, True, 3, ("q_proj", "v_proj"))
    assert found.shape.d_model == tiny.D_MODEL
    found = rehearsal_for(config(folder, load_in_4bit=False, target_modules="q_proj"), CPU)
    assert found is not None
    assert (found.dtype, found.in_4bit, found.adapted) == (torch.float32, False, ("q_proj",))
    plain = rehearsal_for(config(folder), CPU)
    assert plain is not None and plain.adapted is None


@pytest.mark.parametrize("name", ["no/such-model-here", "./nowhere", "demmo"])
def test_a_model_that_is_not_here(name: str) -> None:
    assert nearby_config(name) is None
    assert rehearsal_for(config(name), CPU) is None


def test_a_model_in_the_cache_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    snapshot = tmp_path / "models--someone--small" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "models--someone--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    (snapshot / "config.json").write_bytes((folder / "config.json").read_bytes())
    assert nearby_config("someone/small") is None  # its weights have to come first
    (snapshot / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    found = nearby_config("someone/small")
    assert found is not None and found["hidden_size"] == tiny.D_MODEL


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert nearby_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("[]")
    assert nearby_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    assert rehearsal_for(config(tmp_path), CPU) is None


def test_it_is_a_cards_business(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert rehearse(config(folder), ALONE, no_meeting) == ""


@pytest.mark.parametrize("rank", [ALONE, Rank(number=1, n=2, local=1, n_local=2)])
def test_what_fails_is_said_and_no_other_rank_waits(folder: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is found, and then does not start."""
    if torch.cuda.is_available():
        pytest.skip("the card would start")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    met: list[bool] = []
    said = rehearse(config(folder), rank, lambda: met.append(True))
    assert said.startswith("kernels are compiled when they are used first, not ahead: ")
    assert "\n" not in said and len(said) > 70
    assert met == [True]


def no_meeting() -> None:
    raise AssertionError("nobody is there to meet")
