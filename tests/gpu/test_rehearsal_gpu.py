"""A layer rehearsed on a card: the model that is loaded then finds its kernels compiled, and the memory as it was."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def told(medium_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of three processes, each with a cold cache."""
    found = {}
    for how in ("plain", "rehearsed", "shared"):
        command = [
            sys.executable,
            "-m",
            "tests.gpu.rehearsal_job",
            str(medium_folder),
            str(tmp_path_factory.mktemp(how)),
            how,
        ]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert said.returncode == 0, said.stderr[-3000:]
        found[how] = json.loads(said.stdout.splitlines()[-1])
        print(f"\n  {how}: {json.dumps(found[how])}")
    return found


def test_kernels_are_there(told: dict[str, dict[str, Any]]) -> None:
    plain, rehearsed = told["plain"], told["rehearsed"]
    assert rehearsed["said"] == "" and not plain["kernels"]
    # Those, and none that is compiled otherwise: the model has nothing left to compile.
    assert len(plain["more"]) >= 10 and set(plain["more"]) <= set(rehearsed["kernels"])
    assert rehearsed["more"] == []


def test_two_processes_compile_for_each_other(told: dict[str, dict[str, Any]]) -> None:
    first, both = told["shared"]["shares"]
    assert 0.3 * len(both) <= len(first) <= 0.7 * len(both)
    assert both == told["rehearsed"]["kernels"] == told["shared"]["kernels"]
    assert told["shared"]["rehearsed_seconds"] < 0.6 * told["rehearsed"]["rehearsed_seconds"]


def test_loading_is_quicker(told: dict[str, dict[str, Any]]) -> None:
    assert told["rehearsed"]["loaded_seconds"] < 0.6 * told["plain"]["loaded_seconds"]


def test_nothing_stays(told: dict[str, dict[str, Any]]) -> None:
    """No memory; and no module of another library, which another thread might be importing at the same time."""
    assert told["rehearsed"]["held"] == 0
    assert told["rehearsed"]["reserved"] <= told["plain"]["reserved"]
    packages = {name.partition(".")[0] for name in told["rehearsed"]["imported"]}
    # The last two are what Triton makes itself: a kernel's launcher, and how a driver is called.
    assert packages - {"triton", "__triton_launcher", "cuda_utils"} <= sys.stdlib_module_names
