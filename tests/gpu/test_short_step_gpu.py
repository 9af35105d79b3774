"""Memory that one of two cards lacks in an optimizer's step ends both, with nothing lost; needs two cards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gpu.short_step_job import ENDS, STEP, TOTAL
from tests.gpu.two_ranks import told_by_two
from tests.run.test_ranks import of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one card has nobody to end with it"),
]
# From loading to the end of all; NCCL would wait ten minutes for a rank that has gone.
PATIENCE_SECONDS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("short")


@pytest.fixture(scope="module")
def told(medium_folder: Path, folder: Path) -> list[dict[str, Any]]:
    """What each of two ranks saw."""
    return told_by_two("short_step_job", medium_folder, folder, seconds=200)


@pytest.mark.parametrize("name", ENDS)
def test_both_end_with_the_same_reason(told: list[dict[str, Any]], name: str) -> None:
    for rank in told:
        found = rank[name]
        print(json.dumps({"ends": name, "seconds": found["seconds"], "error": found["error"]}))
        kind, text = found["error"]
        assert kind == "MemoryExhaustedError" and f"rank {ENDS[name][0]} of 2: memory ran out" in text
        assert found["seconds"] < PATIENCE_SECONDS


@pytest.mark.parametrize("name", ["not begun on 1", "cut on 1"])
def test_a_step_that_the_first_rank_took_is_saved(told: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name]["events"] for rank in told)
    assert [step[0] for step in of("step", first)] == [*range(1, STEP + 1)]
    assert of("saved", first) == [[STEP, f"step-{STEP:06d}"], [STEP, "adapter"]]
    assert not of("saved", second)


def test_cut_in_two_on_the_first_rank_the_last_checkpoint_is_named(told: list[dict[str, Any]]) -> None:
    assert of("saved", told[0]["cut on 0"]["events"])[-1] == [STEP - 1, f"step-{STEP - 1:06d}"]
    assert f"step-{STEP - 1:06d}" in told[0]["cut on 0"]["error"][1]


def test_what_was_saved_goes_on_to_the_same_end(told: list[dict[str, Any]]) -> None:
    for rank in told:
        whole, resumed = (of("step", rank[name]["events"]) for name in ("whole", "resumed"))
        assert rank["resumed"]["status"] == "done"
        assert [step[0] for step in resumed[STEP - TOTAL :]] == [*range(STEP + 1, TOTAL + 1)]
        # Attention's backward adds in an order of its own.
        losses = [[step[1] for step in steps[STEP - TOTAL :]] for steps in (resumed, whole)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)
