"""``torchrun ... -m nbqlora.cli finetune FILE.toml`` as it stands in the README, and plans for more than there is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nbqlora import cli
from tests import tiny

ROOT = Path(__file__).parents[2]
JOB = """
model = "{model}"
data = "{rows}"
output_dir = "{out}"
max_length = 96
packing = false
effective_batch_size = 4
max_steps = 2
lora_r = 4
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(map(json.dumps, tiny.make_rows(12))))
    model = tiny.save_model(folder / "model")
    file = folder / "job.toml"
    file.write_text(JOB.format(model=model, rows=rows, out=folder / "out"))
    return file


def test_torchrun_needs_nothing_else(job: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "nbqlora.cli", "finetune"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command, str(job)], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split("  loss")[0] for line in lines if "/2  loss " in line] == ["  step 1/2", "  step 2/2"]
    (cards,) = [line for line in lines if line.startswith("  cards ")]
    assert "2 processes" in cards
    assert any(line.startswith("job: done in ") for line in lines)
    assert "parallel_mode" not in done.stderr
    told = json.loads((job.parent / "out" / "run.json").read_text())
    assert told["plan"]["n_cards"] == 2
    assert len(told["rank_peaks"]) == 2 and max(told["rank_peaks"]) == told["measured_peak_bytes"] > 0


def test_a_plan_for_more_than_there_is(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(job), "--gpus", "2", "--nodes", "2"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "cards 2 machines of 2 processes 1 of a step's 4 rows on each; " in told
    assert ", shared by 2 processes" in told
    assert "how fast the network between the machines is, is not known; 1.25 GB/s are assumed" in told


def test_a_plan_for_all_there_is(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(job), "--gpus", "all"]) == 0
    assert "job" in capsys.readouterr().out


@pytest.mark.parametrize("option", ["--gpus", "--nodes"])
@pytest.mark.parametrize("wrong", ["two", "0", "-1", "1.5"])
def test_what_counts_nothing_is_no_plan(job: Path, capsys: pytest.CaptureFixture[str], option: str, wrong: str) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", str(job), f"{option}={wrong}"])
    expected = "cards from 1, or all" if option == "--gpus" else "machines from 1"
    assert f"{option}: expected a number of {expected}, got {wrong}" in capsys.readouterr().err


def test_a_group_that_cannot_be(job: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["finetune", str(job)]) == 1
    assert capsys.readouterr().err == (
        "RunError: RANK is set and MASTER_ADDR, MASTER_PORT is not; start the ranks with torchrun, or set all of them\n"
    )
