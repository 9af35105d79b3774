"""A run that is killed at any moment goes on bit for bit: a fork server kills it hundreds of times (``kills.py``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def kill(times: int, seed: int) -> dict[str, Any]:
    """What the kills hit. Everything is compared in there, and a difference ends it."""
    command = [sys.executable, "-m", "tests.run.kills", "--kills", str(times), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(told)
    return told


def check_phases(told: dict[str, Any], times: int) -> None:
    assert told["kills"] >= times
    for phase, share in {"looking": 0.01, "loading": 0.05, "training": 0.1, "writing a checkpoint": 0.1}.items():
        assert told.get(phase, 0) >= share * times, f"only {told.get(phase, 0)} kills while {phase}"
    assert told["chains"] >= 4, "every setting should have come to its end"


def test_200_kills_change_no_bit() -> None:
    check_phases(kill(200, seed=1), 200)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [10, 11, 12, 13, 14])
def test_1000_kills_change_no_bit(seed: int) -> None:
    check_phases(kill(200, seed), 200)
