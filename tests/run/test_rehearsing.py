"""What a run's options say of the layer that is rehearsed, and what is said where it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.ranks import ALONE, Rank
from nbqlora.core.request import CellRequest
from nbqlora.hub.nearby import nearby_config
from nbqlora.run import rehearsing
from nbqlora.run.rehearsing import rehearsal_for, rehearse, shape_for
from nbqlora.run.tables import table_fields
from tests import tiny

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
# What is left for the thread beside the imports, of a model that lies in the hub's cache: what does that import? In 16
# bits, since a CPU unpacks NF4 with bitsandbytes; the test on a card has NF4.
IN_A_THREAD = """
import sys
import torch.fx.experimental.symbolic_shapes
import nbqlora.run.ranks
from nbqlora.core.config import FinetuneConfig
from nbqlora.run.rehearsing import rehearsal_for, shape_for
config = FinetuneConfig(model="someone/small", data=[], load_in_4bit=False)
shape = shape_for(config)
before = set(sys.modules)
rehearsal = rehearsal_for(config, shape, torch.device("cpu"))
rehearsal.attend()
rehearsal.run()
print(sorted(set(sys.modules) - before))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"))


def config(model: object, **changes: Any) -> FinetuneConfig:
    options = {"model": str(model), "data": [], **changes}
    return validate(CellRequest(options=options), table_fields=table_fields)


def test_a_runs_layer(folder: Path) -> None:
    shape = shape_for(config(folder))
    assert shape is not None
    asked = config(folder, lora_r=3, dtype="bf16", target_modules=["q_proj", "v_proj"])
    found = rehearsal_for(asked, shape, CPU)
    assert (found.dtype, found.in_4bit, found.lora_r, found.adapted) == (torch.bfloat16, True, 3, ("q_proj", "v_proj"))
    assert found.shape.d_model == tiny.D_MODEL
    found = rehearsal_for(config(folder, load_in_4bit=False, target_modules="q_proj"), shape, CPU)
    assert (found.dtype, found.in_4bit, found.adapted) == (torch.float32, False, ("q_proj",))
    assert rehearsal_for(config(folder), shape, CPU).adapted is None


@pytest.mark.parametrize("name", ["no/such-model-here", "./nowhere", "demmo"])
def test_a_model_that_is_not_here(name: str) -> None:
    assert nearby_config(name) is None
    assert shape_for(config(name)) is None


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
    told = subprocess.run(
        [sys.executable, "-c", IN_A_THREAD], cwd=ROOT, env={**os.environ, "HF_HUB_CACHE": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert told.stdout.strip() == "[]"
    found = nearby_config("someone/small")
    assert found is not None and found["hidden_size"] == tiny.D_MODEL


def test_a_config_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert nearby_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("[]")
    assert nearby_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 8}))
    assert shape_for(config(tmp_path)) is None


def test_it_is_a_cards_business(folder: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert rehearse(config(folder), shape_for(config(folder)), ALONE, no_meeting) == ""


@pytest.mark.parametrize("rank", [ALONE, Rank(number=1, n=2, local=1, n_local=2)])
def test_what_fails_is_said_and_no_other_rank_waits(folder: Path, rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is found, and then does not start."""
    if torch.cuda.is_available():
        pytest.skip("the card would start")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    met: list[bool] = []
    said = rehearse(config(folder), shape_for(config(folder)), rank, lambda: met.append(True))
    assert said.startswith("kernels are compiled when they are used first, not ahead: ")
    assert "\n" not in said and len(said) > 70
    assert met == [True]
    # A rank that has nothing to rehearse is waited for all the same.
    assert rehearse(config(folder), None, rank, lambda: met.append(True)) == ""
    assert met == [True, True]


class Logged:
    """Stands for a rehearsal on a card; what fails is out of memory."""

    def __init__(self, fails: str = "") -> None:
        self.done, self._fails = list[str](), fails

    def attend(self) -> None:
        time.sleep(0.2)
        self._do("attention")

    def run_share(self, number: int, n: int) -> None:
        self._do(f"share {number} of {n}")

    def run(self) -> None:
        self._do("all")

    def _do(self, what: str) -> None:
        self.done.append(what)
        if what == self._fails:
            raise torch.OutOfMemoryError(f"no room for {what}\nat all")


@pytest.mark.parametrize("fails", ["", "attention", "share 1 of 2", "all"])
def test_all_is_run_behind_every_part_and_says_what_failed(
    fails: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = Logged(fails)
    for name in ("attend", "run_share", "run"):
        monkeypatch.setattr(rehearsing.Rehearsal, name, getattr(Logged, name))
    monkeypatch.setattr(rehearsing, "rehearsal_for", lambda *_: logged)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rank = Rank(number=3, n=4, local=1, n_local=2)
    said = rehearse(config(folder), shape_for(config(folder)), rank, lambda: logged.done.append("met"))
    assert logged.done == ["share 1 of 2", "met", "attention", "all"]
    # What a part alone had no room for was done by the whole behind it.
    failed = "kernels are compiled when they are used first, not ahead: OutOfMemoryError: no room for all"
    assert said == (failed if fails == "all" else "")


def no_meeting() -> None:
    raise AssertionError("nobody is there to meet")
