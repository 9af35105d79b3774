"""Two cards that have the layers' weights split over both, beside two that have all of them; needs two cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.units import MIB
from tests import tiny
from tests.gpu.two_ranks import told_by_two

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card cannot split a model with another"),
]
LAYERS = 12
LONGEST_SECONDS = 450


def layer_bytes() -> int:
    """NF4 bytes of a layer of ``medium_folder``: q and o, k and v, the MLP."""
    return (2 * 1024 * 1024 + 2 * 256 * 1024 + 3 * 4096 * 1024) // 2


@pytest.fixture(scope="module")
def folder(medium_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in NF4: both ways load the same bytes."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    made = tmp_path_factory.mktemp("nf4")
    model = AutoModelForCausalLM.from_pretrained(
        medium_folder, quantization_config=nf4, device_map={"": 0}, dtype=torch.bfloat16
    )
    model.save_pretrained(made)
    tiny.make_tokenizer().save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def told(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    out = tmp_path_factory.mktemp("sharded")
    return told_by_two("sharded_job", folder, out, seconds=LONGEST_SECONDS)


def test_every_pair_of_bytes_comes_back_as_it_was(told: list[dict[str, Any]]) -> None:
    assert [rank["bits"] for rank in told] == [[True, True]] * 2


def test_losses_are_those_of_whole_weights(told: list[dict[str, Any]]) -> None:
    for rank in told:
        split, whole = rank["split"], rank["whole"]
        assert (split["shards"], whole["shards"]) == (2, 1)
        # A forward is the same to the bit; attention's backward adds in an order of its own.
        assert split["evals"][0] == whole["evals"][0]
        assert split["losses"][0] == whole["losses"][0]
        assert split["losses"] == pytest.approx(whole["losses"], rel=1e-3)
        for name in ("full", "offload"):
            assert rank[name]["losses"] == pytest.approx(whole["losses"], rel=1e-3)
            assert set(rank[name]["policies"]) == {"recompute" if name == "full" else "offload"}
    assert told[0]["split"]["losses"] == told[1]["split"]["losses"]


def test_the_peak_is_lower_by_what_the_shares_save(told: list[dict[str, Any]]) -> None:
    saved = LAYERS * layer_bytes() // 2 - 2 * layer_bytes()
    for rank in told:
        split, whole = rank["split"], rank["whole"]
        print(json.dumps({"split": split, "whole": whole, "saved": saved}))
        assert whole["measured"] - split["measured"] >= saved - 4 * MIB
        assert 0.98 * split["measured"] <= split["planned"] <= 1.2 * split["measured"]


def test_a_gather_runs_beside_the_layer_before(told: list[dict[str, Any]]) -> None:
    for rank in told:
        found = rank["overlap"]
        print(json.dumps(found))
        # Two steps: up, and down without the last layer, which stays. The first ones of a step have nothing beside
        # them: it begins with an idle card, for which launches come too slowly.
        assert found["gathers"] == 2 * (2 * LAYERS - 1)
        assert found["beside"] >= 0.75 * found["gathers"]


def test_one_card_without_memory_takes_the_other_down_the_ladder(told: list[dict[str, Any]]) -> None:
    first, second = (rank["short"] for rank in told)
    assert first["short"] == second["short"] > 0
    assert first["policies"] == second["policies"]
    assert first["losses"] == second["losses"] == pytest.approx(told[0]["split"]["losses"], rel=1e-3)
