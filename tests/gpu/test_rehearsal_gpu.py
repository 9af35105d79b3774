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
    """Of two processes, each with a cold cache."""
    found = {}
    for how in ("plain", "rehearsed"):
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


def test_loading_is_quicker(told: dict[str, dict[str, Any]]) -> None:
    assert told["rehearsed"]["loaded_seconds"] < 0.6 * told["plain"]["loaded_seconds"]


def test_nothing_stays(told: dict[str, dict[str, Any]]) -> None:
    """No memory; and no module of another library, which another thread might be importing at the same time."""
    assert told["rehearsed"]["held"] == 0
    assert told["rehearsed"]["reserved"] <= told["plain"]["reserved"]
    packages = {name.partition(".")[0] for name in told["rehearsed"]["imported"]}
    assert packages - {"triton"} <= sys.stdlib_module_names
