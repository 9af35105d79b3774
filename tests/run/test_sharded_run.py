"""Whole runs with the layers' weights split over two processes: the path of one, its checkpoints and its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from tests import tiny
from tests.run import resuming
from tests.run.sharded_job import PLAIN
from tests.run.test_ranks import check_same_path, events, of, told_by_two


@pytest.fixture(scope="module")
def folder(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is quantized on loading, and the same stored in NF4."""
    made = tmp_path_factory.mktemp("sharded")
    tiny.save_model(made / "model")
    tiny.load_nf4(made / "model").save_pretrained(made / "nf4")
    tiny.make_tokenizer().save_pretrained(made / "nf4")
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """A whole run of one process, at whose first step two go on."""
    whole = resuming.finetune(folder / "model", folder / "alone", **PLAIN, **resuming.EVERY_STEP)
    resuming.until(1, folder / "alone", folder / "one to two")
    return events(whole)


@pytest.fixture(scope="module")
def together(folder: Path, alone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What each of two ranks says."""
    return told_by_two(folder, "sharded_job")


def test_the_loss_path_is_that_of_one(alone: Any, together: Any) -> None:
    for rank in together:
        assert (rank["split"]["shards"], rank["split"]["status"]) == (2, "done")
        check_same_path(rank["split"]["events"], alone)


def test_bits_are_those_of_whole_weights(folder: Path, together: Any) -> None:
    for rank in together:
        assert rank["whole"]["shards"] == 1
        for kind in ("step", "eval"):
            assert of(kind, rank["split"]["events"]) == of(kind, rank["whole"]["events"])
    files = [resuming.weights(folder / name / "adapter") for name in ("split", "whole on each")]
    assert files[0] == files[1]


def test_a_model_in_nf4_is_split_as_it_is(together: Any) -> None:
    steps = [of("step", together[0][name]["events"]) for name in ("in NF4", "split")]
    assert len(steps[0]) == 2
    assert steps[0][0][1] == pytest.approx(steps[1][0][1], rel=1e-6)


def test_one_goes_on_as_two_and_two_as_one(folder: Path, alone: Any, together: Any) -> None:
    told = together[0]["one to two"]["events"]
    check_same_path(told, [event for event in alone if event[0] in ("step", "eval") and event[1] > 1])
    out = resuming.until(2, folder / "split", folder / "two to one")
    check_same_path(events(resuming.finetune(folder / "model", out, resume=True, **PLAIN)), alone)


def test_the_adapter_is_any_other(folder: Path, together: Any) -> None:
    model = PeftModel.from_pretrained(tiny.load_nf4(folder / "model"), str(folder / "split" / "adapter"))
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert len(found) == 2 * 7 * tiny.LAYERS
    assert all(torch.isfinite(p).all() for p in found.values())
    assert all(p.abs().sum() > 0 for name, p in found.items() if "lora_B" in name)


def test_to_talk_to_it_a_process_alone_is_needed(together: Any) -> None:
    for rank in together:
        assert rank["split"]["said"].startswith("ModelError: this model's weights are split over several cards")
        assert not rank["whole"]["said"].startswith("ModelError")
