"""Ctrl-C in a terminal: what is said, what is kept, and the exit status."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbqlora import api, cli
from nbqlora.core.events import PhaseEvent, StepEvent

JOB = """model = "{model}"
data = "rows.jsonl"
max_steps = 100000
max_length = 96
packing = false
per_device_train_batch_size = 1
gradient_accumulation_steps = 2
[trl]
dataloader_num_workers = 1
"""
PATIENCE_SECONDS = 120
QUICK = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """Ctrl-C as usual, also where pytest runs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path, tiny_rows: list[Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny_rows * 8)))
    (tmp_path / "job.toml").write_text(JOB.format(model=tiny_folder))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def in_terminal(command: list[str], ctrl_c_at: str) -> tuple[int, str]:
    """Run in a terminal of its own, and type Ctrl-C when a pattern was printed: status and all that was printed."""
    pid, terminal = pty.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # whoever runs the tests may ignore it
        os.execve(command[0], command, {**os.environ, **QUICK})
    said, typed, until = "", False, time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        try:
            said += os.read(terminal, 4096).decode()
        except OSError:  # Linux says so when the other side is closed
            break
        if not typed and re.search(ctrl_c_at, said):
            os.write(terminal, b"\x03")
            typed = True
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.replace("\r\n", "\n")


def test_ctrl_c_in_a_terminal_ends_the_run_with_status_0_and_says_how_to_go_on(folder: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "nbqlora.cli", "finetune", "job.toml"]
    status, said = in_terminal(command, ctrl_c_at=r"step 2/100000")
    assert status == 0, said
    assert "[stop] after this step; a second interrupt drops the step\n" in said
    assert "job: stopped (interrupted) in " in said
    assert said.rstrip().endswith("to go on from here: nbqlora finetune job.toml --resume")
    assert "Traceback" not in said and "DataLoader worker" not in said
    assert (folder / "runs/job/adapter/adapter_model.safetensors").is_file()


@pytest.fixture
def act(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], bool]], None]:
    """Interrupts this process when an event is printed that a function picks."""
    printed = cli._print

    def prepare(picks: Callable[[Any], bool]) -> None:
        def both(event: Any) -> None:
            printed(event)
            if picks(event):
                signal.raise_signal(signal.SIGINT)

        monkeypatch.setattr(cli, "_print", both)

    return prepare


def _step_or_stop(event: Any) -> bool:
    return isinstance(event, StepEvent) or (isinstance(event, PhaseEvent) and event.phase == "stop")


def test_ctrl_c_twice_is_status_130_and_one_line(folder: Path, act: Any, capsys: pytest.CaptureFixture[str]) -> None:
    act(_step_or_stop)
    assert cli.main(["finetune", "job.toml"]) == 130
    kept = "the adapter is in runs/job/adapter"
    assert _last(capsys) == f"InterruptedRunError: interrupted in the middle of a step; {kept}"
    assert (folder / "runs/job/adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("phase", ["look", "load"])
def test_ctrl_c_before_training_is_status_130_and_one_line(
    folder: Path, act: Any, capsys: pytest.CaptureFixture[str], phase: str
) -> None:
    act(lambda event: isinstance(event, PhaseEvent) and event.phase == phase)
    assert cli.main(["finetune", "job.toml"]) == 130
    assert _last(capsys) == "InterruptedRunError: interrupted before training began; nothing was saved"


def test_ctrl_c_in_another_command_is_status_130_and_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "plan_request", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert cli.main(["plan", "job.toml"]) == 130
    assert _last(capsys) == "interrupted"


def _last(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if not re.search(r"it/s\]|Warning|warn\(", line)]
    return "\n".join(lines)
