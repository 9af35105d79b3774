"""Runs of two ranks end to end, on a CPU: the same losses as one, whatever happens to them, and nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

import psutil
import pytest

import nbqlora
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, MemoryExhaustedError
from nbqlora.core.events import DataEvent, EvalEvent, OomEvent, PlannedEvent, StepEvent
from nbqlora.data.scratch import PREFIX
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, find_checkpoints, first_whole
from nbqlora.run.journal import Journal
from nbqlora.run.steps import finetune_config
from nbqlora.run.workers.counting import workers_asked
from nbqlora.run.workers.together import finetune_together
from nbqlora.run.workers.worker import LAST_SECONDS
from tests import tiny
from tests.run import stand_ins, worker_kills

ROOT = Path(__file__).parents[2]
ROWS = tiny.make_rows(12)
# Of a busy machine.
LAG_SECONDS = 10.0
OPTIONS: dict[str, Any] = {
    "max_length": 96, "learning_rate": 1e-2, "lora_r": 4, "effective_batch_size": 4, "packing": False, "max_steps": 5,
    "per_device_train_batch_size": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    before = worker_kills.listening()
    yield
    assert worker_kills.workers() == {} and worker_kills.listening() <= before


def test_two_train_as_one(quick: None, model: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "eval_data": tiny.make_rows(3, seed=1), "model": str(model), "data": ROWS}
    one = nbqlora.finetune(**options, output_dir=str(tmp_path / "one"))
    events: list[Any] = []
    two = nbqlora.finetune(**options, output_dir=str(tmp_path / "two"), gpus=2, observe=events.append)
    assert [e.loss for e in two.report.steps] == pytest.approx([e.loss for e in one.report.steps], rel=1e-4)
    assert [e.loss for e in two.report.evals] == pytest.approx([e.loss for e in one.report.evals], rel=1e-4)
    kinds = (DataEvent, PlannedEvent, StepEvent, EvalEvent)
    told = [sum(isinstance(e, kind) for e in events) for kind in kinds]
    assert told == [1, 1, 5, len(one.report.evals)], "once each, although two told it"
    assert list((tmp_path / "temporary").glob(f"{PREFIX}*")) == [], "the rows that were handed on are gone"
    assert (two.status, two.plan.n_cards, two.plan.effective_batch_size) == ("done", 2, 4)
    assert len(two.report.rank_peaks) == 2 and two.report.measured_peak_bytes == max(two.report.rank_peaks) > 0
    assert isinstance(two.chat("sun", max_new_tokens=4), str)
    two.free()
    merged = two.merge(tmp_path / "merged", check=False)
    assert (tmp_path / "merged" / "config.json").is_file() and merged.check is None
    one.free()


def test_one_that_has_no_memory_left_is_told_with_what_fits(quick: None, model: Path, tmp_path: Path) -> None:
    config = FinetuneConfig(**OPTIONS, model=str(model), data=ROWS, output_dir=str(tmp_path / "out"), gpus=2)
    events: list[Any] = []
    with pytest.raises(MemoryExhaustedError) as caught:
        finetune_together(
            config, 2, Journal(events.append), name="run1", resume=False, how="do this",
            finetune=stand_ins.without_memory,
        )  # fmt: skip
    assert "all memory of this run was given back" in str(caught.value)
    actions = [e.action for e in events if isinstance(e, OomEvent)]
    assert actions and len(actions) == len(set(actions)), "each rung once, although both told it"
    assert {e.asked_bytes for e in events if isinstance(e, OomEvent)} == {2 << 30}


def test_max_minutes_counts_from_the_call(quick: None, model: Path, tmp_path: Path) -> None:
    """Not from when a worker begins, which is seconds later, or much where many rows are tokenized."""
    config = FinetuneConfig(**OPTIONS, model=str(model), data=ROWS, output_dir=str(tmp_path), gpus=2, max_minutes=60)
    journal = Journal(None, called=perf_counter() - 3600)
    run = finetune_together(config, 2, journal, name="run1", resume=False, how="", finetune=finetune_config)
    assert (run.status, run.report.reason, len(run.report.steps)) == ("stopped", "max_minutes reached", 1)
    assert run.report.seconds > 3600 and min(e.elapsed_seconds for e in run.events) > 3600


KERNEL = """
import sys
import nbqlora
from tests.run.test_workers_run import OPTIONS, ROWS

def tell(event):
    if type(event).__name__ == "StepEvent":
        print(event.step, flush=True)

if __name__ == "__main__":
    options = {**OPTIONS, "max_steps": 5000, "save_minutes": 1e-9, "gpus": 2}
    nbqlora.finetune(**options, model=sys.argv[1], data=ROWS, output_dir=sys.argv[2], observe=tell)
"""


def test_a_kernel_that_is_killed_leaves_no_process_and_a_run_to_go_on_with(
    quick: None, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "kernel.py").write_text(KERNEL)
    out = tmp_path / "out"
    kernel = subprocess.Popen(
        [sys.executable, str(tmp_path / "kernel.py"), str(model), str(out)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    assert kernel.stdout is not None
    told = [int(kernel.stdout.readline()) for _ in range(3)]
    workers = [p for p in psutil.Process(kernel.pid).children(recursive=True) if "-m" in p.cmdline()]
    assert len(workers) == 2 and told == [1, 2, 3]
    kernel.kill()
    kernel.communicate()
    _, alive = psutil.wait_procs(workers, timeout=LAST_SECONDS + LAG_SECONDS)
    assert alive == []
    found, unreadable = find_checkpoints(out / CHECKPOINTS_FOLDER)
    best, damaged = first_whole(found)
    assert best is not None and best.step >= 3 and not unreadable and not damaged
    # One card goes on where two were.
    again = nbqlora.finetune(
        **{**OPTIONS, "max_steps": 5000}, model=str(model), data=ROWS, output_dir=str(out), resume=True,
        observe=StopAt(best.step + 2),
    )  # fmt: skip
    assert [e.step for e in again.report.steps] == list(range(1, best.step + 3))


class StopAt:
    """Interrupts as ■ does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == self.step - 1:
            from tests.train.interrupts import interrupt

            interrupt()


def test_how_many_processes_an_option_means(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(gpus: int | str | None, **environ: str) -> int:
        return workers_asked(FinetuneConfig(model="m", data="d", gpus=gpus), environ)

    assert [asked(None), asked(1), asked(2), asked("all")] == [1, 1, 2, 1], "a CPU is one, and shared if asked for"
    torchrun = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    assert asked(2, **torchrun) == 1, "a worker starts none"
    assert asked(2, RANK="0", WORLD_SIZE="1") == 2, "some systems always set these"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [asked(None), asked(1), asked(2), asked("all")] == [1, 1, 2, 2]
    with pytest.raises(ConfigError) as caught:
        asked(3)
    assert [(p.key, p.message) for p in caught.value.problems] == [("gpus", "3 are asked for, and this machine has 2")]


def kill(times: int, seed: int, folder: Path) -> None:
    """In a process of its own, which stands for the kernel; everything is compared in there."""
    command = [sys.executable, "-m", "tests.run.worker_kills", "--kills", str(times), "--seed", str(seed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    print(done.stdout)


@pytest.mark.slow
def test_2_kills_of_a_random_rank(tmp_path: Path) -> None:
    kill(2, 10, tmp_path)  # of rank 0 in training, of rank 1 while it starts


@pytest.mark.slow
def test_50_kills_of_a_random_rank(tmp_path: Path) -> None:
    kill(50, 2, tmp_path)
