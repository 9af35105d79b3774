"""An optimizer's step that finds no memory on one of two ranks: done again if it was not begun, else the end of all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.train.ranks import ANOTHER, Ranks
from tests import tiny
from tests.run import resuming
from tests.run.short_step_job import ENDS, STEP, TOTAL
from tests.run.test_ranks import of, told_by_two

Told = tuple[dict[str, Any], dict[str, Any]]
BEGUN = "memory ran out in the middle of the optimizer's step, which cannot be taken back"
NO_ROOM = "memory ran out (optimizer, 2.0 GiB asked for) with nothing left to lower"
# Nobody waits for a rank that has gone: gloo would raise when its process ends, a card's backend not even then.
PATIENCE_SECONDS = 15


@pytest.fixture(scope="module")
def folder(quick: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("short")
    tiny.save_model(made / "model")
    return made


@pytest.fixture(scope="module")
def together(folder: Path) -> Told:
    """What each of two ranks says."""
    return told_by_two(folder, "short_step_job")


def steps(told: dict[str, Any]) -> list[Any]:
    return of("step", told["events"])


def saved(told: dict[str, Any]) -> list[Any]:
    return of("saved", told["events"])


def test_what_was_not_begun_is_done_again_and_ranks_stay_on_one_rung(folder: Path, together: Told) -> None:
    first, second = (rank["goes on"] for rank in together)
    own = [STEP, "optimizer", "unused memory was given back"]
    assert second["short"][0] == own
    # Memory was given back a step ago, there: what is short next takes a rung on both.
    assert first["short"] == second["short"][1:]
    assert [(step, phase) for step, phase, _ in first["short"]] == [(STEP + 1, "forward")]
    assert first["short"][0][2] != own[2]
    for rank, found in zip(together, (first, second), strict=True):
        assert (found["status"], steps(found)) == ("done", steps(rank["whole"]))
    files = [resuming.weights(folder / name / "adapter") for name in ("goes on", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ENDS)
def test_all_end_with_the_same_reason_and_nobody_waits(together: Told, name: str) -> None:
    told = [rank[name] for rank in together]
    why = BEGUN if "cut" in name or "last" in name else NO_ROOM
    for found in told:
        kind, text = found["error"]
        assert kind == "MemoryExhaustedError"
        assert f"rank {ENDS[name][0]} of 2: {why}\n" in text
        assert found["seconds"] < PATIENCE_SECONDS


@pytest.mark.parametrize("name", ["not begun on 1", "cut on 1"])
def test_a_step_that_the_first_rank_took_is_saved(folder: Path, together: Told, name: str) -> None:
    first, second = (rank[name] for rank in together)
    assert steps(first) == steps(together[0]["whole"])[:STEP]
    assert of("stopped", first["events"]) == [[STEP, "memory ran out on rank 1"]]
    assert saved(first) == [[STEP, f"step-{STEP:06d}"], [STEP, "adapter"]]
    assert not saved(second)
    text = first["error"][1]
    assert f"the adapter of step {STEP} is in {folder / name / 'adapter'}" in text
    assert text.endswith(f"to go on after step {STEP} of {TOTAL}")


def test_nothing_is_lost(folder: Path, together: Told) -> None:
    for rank in together:
        assert rank["resumed"]["status"] == "done"
        assert steps(rank["resumed"])[STEP - TOTAL :] == steps(rank["whole"])[STEP:]
    files = [resuming.weights(folder / name / "adapter") for name in ("cut on 1", "whole")]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["not begun on 0", "not clipped on 0"])
def test_before_it_began_on_the_first_rank_its_adapter_is_that_of_the_step_before(
    folder: Path, together: Told, name: str
) -> None:
    found = together[0][name]
    assert [step[0] for step in steps(found)] == [*range(1, STEP)]
    assert saved(found)[-1] == [STEP - 1, "adapter"]
    last = folder / name / "checkpoints" / f"step-{STEP - 1:06d}"
    files = [resuming.weights(place) for place in (folder / name / "adapter", last)]
    assert files[0] == files[1], "nothing is stepped with gradients that were not clipped"
    assert found["error"][1].endswith(f"to go on after step {STEP - 1} of {TOTAL}")


def test_cut_in_two_on_the_first_rank_the_last_checkpoint_is_named(folder: Path, together: Told) -> None:
    found, name = together[0]["cut on 0"], "cut on 0"
    last = f"step-{STEP - 1:06d}"
    assert saved(found)[-1] == [STEP - 1, last]
    assert f"what was saved last is {folder / name / 'checkpoints' / last}\n" in found["error"][1]
    assert found["error"][1].endswith(f"to go on after step {STEP - 1} of {TOTAL}")


def test_without_room_for_the_states_no_step_is_taken(together: Told) -> None:
    for rank, kept in zip(together, ("no step was taken before it", "rank 0 says what was kept"), strict=True):
        assert not steps(rank["no states on 1"])
        assert kept in rank["no states on 1"]["error"][1]


def test_the_last_step_is_kept_too(together: Told) -> None:
    found = together[0]["last on 1"]
    assert steps(found) == steps(together[0]["whole"])
    assert saved(found)[-1] == [TOTAL, "adapter"]
    assert [e[0] for e in of("eval", found["events"])] == [0, 3], "the last one would be half another adapter's"


def test_a_process_alone_answers_for_itself() -> None:
    assert Ranks(torch.device("cpu")).agree_to_stop(ANOTHER, True, False) == (ANOTHER, (True, False))
