"""Runs into a slow folder that are killed at any moment go on bit for bit, and what was copied is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbqlora.run.mounts import SLOW_FOLDERS

KILLED = """
import json, os, sys, tempfile
from pathlib import Path
from tests.run import kills

with tempfile.TemporaryDirectory() as folder:
    tempfile.tempdir = folder
    os.environ[sys.argv[1]] = os.pathsep.join(f"{folder}/lane{i}" for i in range(2))
    print(json.dumps(kills.run(100, 7, Path(folder))))
    assert len(list(Path(folder).glob("nbqlora-*/chain*"))) >= 4, "the runs were written somewhere else"
"""


@pytest.mark.slow
def test_100_kills_with_copies_change_no_bit():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLED, SLOW_FOLDERS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["chains"] >= 4 and told["writing a checkpoint"] >= 1
