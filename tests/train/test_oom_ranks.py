"""Ranks that train together stand on the same rung, and none waits for one that ran out of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.train.oom import Shortage
from nbqlora.train.ranks import Ranks
from tests import tiny

ROOT = Path(__file__).parents[2]
# What each of two ranks was short of, agreed on by both.
AGREE = """
import pathlib, sys
import torch, torch.distributed as dist, torch.multiprocessing
from nbqlora.train.oom import Shortage
from nbqlora.train.ranks import Ranks

def rank(number, file):
    dist.init_process_group("gloo", init_method="file://" + file, rank=number, world_size=2)
    ranks = Ranks(torch.device("cpu"))
    small = Shortage(phase="forward", asked_bytes=None, tokens=300, n_documents=2)
    large = Shortage(phase="backward", asked_bytes=7 << 33, capturing=True, tokens=200, n_documents=5)
    cases = [(None, None), (None, small), (large, None), (small, large)]
    agreed = [str(ranks.agree(mine[number])) for mine in cases]
    pathlib.Path(file + str(number)).write_text("\\n".join(agreed))
    dist.destroy_process_group()

if __name__ == "__main__":
    torch.multiprocessing.spawn(rank, args=(sys.argv[1],), nprocs=2)
"""


def test_what_one_was_short_of_all_know(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(AGREE)
    python(str(script), str(tmp_path / "together"))
    first, second = ((tmp_path / f"together{n}").read_text().splitlines() for n in "01")
    small = "Shortage(phase='forward', asked_bytes=None, on_host=False, capturing=False, tokens=300, n_documents=2)"
    asked = 7 << 33
    large = f"Shortage(phase='backward', asked_bytes={asked}, on_host=False, capturing=True, tokens=200, n_documents=5)"
    both = large.replace("tokens=200", "tokens=300")
    assert first == second == ["None", small, large, both]


def test_a_process_alone_asks_nobody() -> None:
    short = Shortage(phase="forward", asked_bytes=None)
    assert Ranks(torch.device("cpu")).agree(short) is short


def python(*arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_all_ranks_take_the_same_rung_and_lose_nothing(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", initializer_range=0.2)
    python("-m", "tests.train.oom_ranks", str(model), str(tmp_path))
    told: list[dict[str, Any]] = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1)]
    whole = [t["never"] for t in told]
    assert [r["actions"] for r in whole] == [[], []]
    for failing in ("once", "while"):
        found = [t[failing] for t in told]
        assert [r["failed"] > 0 for r in found] == [False, True], "one rank had the room"
        assert found[0]["actions"] == found[1]["actions"] != []
        assert found[0]["policies"] == found[1]["policies"]
        assert [r["losses"] for r in found] == [r["losses"] for r in whole]
        assert [r["adapter"] for r in found] == [r["adapter"] for r in whole]
        assert found[0]["backwards"] > whole[0]["backwards"], "the rank that had the room ran them again too"
    assert told[0]["while"]["policies"] == ["recompute_mlp"] * 3
