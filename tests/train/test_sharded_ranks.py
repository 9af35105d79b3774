"""Two ranks with the layers' weights split over both train as with all of them on each, bit for bit, and neither waits
for one that ran out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.train.sharded_ranks import MIXES, NO_ROOM, ONCE

ROOT = Path(__file__).parents[2]
Told = tuple[dict[str, Any], dict[str, Any]]
RESULTS = ("losses", "evals", "adapter")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Told]:
    """What each rank says of its runs."""
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny.save_model(folder / "model", initializer_range=0.2)
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.sharded_ranks", str(model), str(folder)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    yield first, second


def same(found: dict[str, Any], other: dict[str, Any]) -> None:
    assert [found[name] for name in RESULTS] == [other[name] for name in RESULTS]


def test_every_pair_of_bytes_comes_back_as_it_was(told: Told) -> None:
    for rank in told:
        assert rank["bits"] == [True] * 6


@pytest.mark.parametrize("mix", MIXES)
def test_bits_are_those_of_whole_weights(told: Told, mix: str) -> None:
    for rank in told:
        found = rank["mixes"][mix]
        same(found, rank["whole"])
        assert len(found["losses"]) == 2
        assert len(found["evals"]) == 2
        assert found["policies"] == [policy.value for policy in MIXES[mix]]
        assert not found["actions"]
    same(told[0]["whole"], told[1]["whole"])


def test_a_rank_holds_its_share_alone(told: Told) -> None:
    for rank in told:
        whole, split = (rank["holdings"][n] for n in ("1", "2"))
        packed = whole["packed"]
        assert sum(split["shares"]) == packed // 2
        assert (whole["bound"], split["bound"]) == (packed, 0)
        assert whole["counted"] - split["counted"] == packed - packed // 2
        assert abs(whole["held"] - split["held"] - packed // 2) <= 64, "a few scalars of the trainer come and go"
        assert split["opened"] == [packed // 3] * 3, "closed, all but the share is freed"


def test_what_is_not_there_is_refused(told: Told) -> None:
    for rank in told:
        said = rank["closed"]
        for name in ("generate", "own forward"):
            assert said[name].startswith("ModelError: this model's weights are split over several cards")
            assert "load its adapter in one process, or merge it" in said[name]
        assert said["weight"] == "RuntimeError: a weight of 64 x 64 is used while it is not there"
        assert said["turn"] == "RuntimeError: layer 1 was asked for out of turn, as 0 of (0, 1, 2)"
        assert said["join"].startswith("ModelError: layers whose weights are split over cards cannot join")
        assert said["captures"] == "False"


@pytest.mark.parametrize("name", [*ONCE, *NO_ROOM])
def test_one_rank_without_memory_keeps_nobody_waiting(told: Told, name: str) -> None:
    first, second = (rank["once"][name] if name in ONCE else rank[name] for rank in told)
    assert (first["failed"], second["failed"]) == (0, len(NO_ROOM[name][1]) if name in NO_ROOM else 1)
    assert first["actions"] == second["actions"] != []
    assert first["passes"] == second["passes"]
    for found, rank in zip((first, second), told, strict=True):
        assert not found["error"]
        same(found, rank["whole"])


def test_all_take_the_same_rung(told: Told) -> None:
    for rank in told:
        found = rank["while"]
        assert found["policies"] == ["recompute_mlp"] * 3
        same(found, rank["whole"])
    assert told[0]["while"]["actions"] == told[1]["while"]["actions"]


def test_a_rank_whose_micro_batch_is_whole_gathers_for_one_in_parts(told: Told) -> None:
    first, second = (rank["parts"] for rank in told)
    assert first["passes"] == second["passes"]
    assert first["adapter"] == second["adapter"]
    assert first["actions"][-1][2].endswith("tokens run in parts")
    for found, rank in zip((first, second), told, strict=True):
        assert found["losses"] == pytest.approx(rank["not in parts"]["losses"], rel=1e-5)


def test_where_nothing_fits_all_end(told: Told) -> None:
    errors = [rank["never"]["error"] for rank in told]
    assert errors[0] == errors[1]
    assert "with nothing left to lower" in errors[0]
