"""``nbqlora doctor`` in a shell; and what a hub's name costs without a network."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbqlora.cli import main
from tests.hub.hub_server import BAD_TOKEN, closed_address, hub_server, point_to


def test_a_problem_ends_with_status_1_and_no_token_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # of the process that tries torch: it answers at once
    with hub_server() as address:
        point_to(address, tmp_path / "hf", monkeypatch)
        monkeypatch.setenv("HF_TOKEN", BAD_TOKEN)
        assert main(["doctor", "--output-dir", str(tmp_path)]) == 1
    said = capsys.readouterr()
    assert said.out.startswith("nbqlora doctor: 2 problems")
    assert "the hub refuses the token of the variable HF_TOKEN" in said.out
    assert BAD_TOKEN not in said.out + said.err and BAD_TOKEN[3:] not in said.out + said.err


def program(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """The real program without a network, and its seconds."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    env = {**clean, "HF_ENDPOINT": closed_address(), "HF_HOME": str(cwd / "hf")}
    begun = time.monotonic()
    command = [sys.executable, "-m", "nbqlora.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=cwd, timeout=60)
    return done, time.monotonic() - begun


def test_without_a_network_the_doctor_answers_in_seconds(tmp_path: Path) -> None:
    done, seconds = program("doctor", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cannot be reached: it refuses the connection" in done.stdout
    assert seconds < 20


def test_without_a_network_a_hub_model_is_one_line_in_seconds(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text('model = "org/model"\ndata = "demo"\n')
    done, seconds = program("plan", "job.toml", cwd=tmp_path)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("ModelError: org/model is not in the cache, and http://127.0.0.1:")
    assert line.endswith('check the network; files of this machine work without: model = "path/to/it"')
    assert seconds < 15
