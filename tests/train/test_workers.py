"""Data workers outlive an interrupt of the whole process group; the run ends well and none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.data_loader import DataLoaderShard, skip_first_batches
from torch.utils.data import TensorDataset

from nbqlora.train.workers import shield_workers
from tests import tiny
from tests.train.group_job import seed, with_seed
from tests.train.interrupts import ROWS
from tests.train.parts import parts

ROOT = Path(__file__).parents[2]
INT = int(signal.SIGINT)
# start method, workers, when, signal, how many signals
Job = tuple[str, int, str, int, int]
JOBS: list[Job] = [("fork", 2, "step", INT, 1), ("fork", 1, "step", INT, 2)]
SLOW_JOBS: list[Job] = [("spawn", 2, "start", INT, 1), ("spawn", 1, "step", INT, 1), ("forkserver", 1, "step", INT, 1)]


@pytest.fixture(autouse=True)
def a_main_module_as_python_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell of IPython made by another test leaves one without a spec, which a spawned process asks for."""
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None, raising=False)


def became(folder: Path, jobs: list[Job]) -> list[tuple[Job, dict[str, Any]]]:
    """What became of each job, all in one process; nothing but its JSON lines may be said."""
    model = tiny.save_model(folder / "model")
    code = "import sys; from tests.train.group_job import main; main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(folder), json.dumps(jobs)],
        env={**os.environ, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        start_new_session=True,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for noise in ("Traceback", "KeyboardInterrupt", "DataLoader", "Exception ignored"):
        assert noise not in done.stderr, done.stderr[-3000:]
    return list(zip(jobs, map(json.loads, done.stdout.splitlines()), strict=True))


def check(jobs: list[tuple[Job, dict[str, Any]]]) -> None:
    for job, result in jobs:
        _, n_workers, _, _, times = job
        if times == 1:
            assert (result.get("status"), result.get("reason")) == ("stopped", "interrupted"), (job, result)
        else:
            kept = "InterruptedRunError: interrupted in the middle of a step; the adapter is in "
            assert result["error"].startswith(kept), (job, result)
        assert result["workers"] == n_workers, f"{job} had no workers to lose"
        assert result["saved"] and result["left"] == 0 and result["handler_is_back"], (job, result)


def test_runs_whose_whole_group_is_signalled(tmp_path: Path) -> None:
    check(became(tmp_path, JOBS))


@pytest.mark.slow
def test_runs_with_spawned_workers_whose_whole_group_is_signalled(tmp_path: Path) -> None:
    check(became(tmp_path, SLOW_JOBS))


@pytest.mark.parametrize(("method", "from_its_start"), [("fork", True), ("spawn", True), ("forkserver", False)])
def test_a_worker_ignores_interrupts(method: str, from_its_start: bool) -> None:
    if method == "forkserver":
        forkserver.ensure_running()  # as another library may have done, without a mask to inherit
    rows = TensorDataset(torch.arange(8))
    settings = {"batch_size": 2, "num_workers": 1, "collate_fn": with_seed, "worker_init_fn": seed}
    loader = shield_workers(DataLoaderShard(rows, multiprocessing_context=method, **settings))
    batches = iter(loader.base_dataloader)
    (worker,) = (w.pid for w in batches._workers)
    seen = [] if from_its_start else [next(batches)]
    while len(seen) < 4:
        os.kill(worker, INT)
        time.sleep(0.05)
        seen.append(next(batches))
    assert seen == [(0, 1000), (2, 1000), (4, 1000), (6, 1000)]
    assert next(batches, None) is None
    assert not psutil.pid_exists(worker)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_worker_can_be_ended_so_that_its_parent_can_exit(method: str) -> None:
    rows = TensorDataset(torch.arange(8))
    loader = shield_workers(DataLoaderShard(rows, batch_size=2, num_workers=1, multiprocessing_context=method))
    batches = iter(loader.base_dataloader)
    next(batches)
    (worker,) = batches._workers
    worker.terminate()  # as multiprocessing does at exit, and then waits without end
    worker.join(timeout=20)
    alive = worker.is_alive()
    worker.kill()
    assert not alive


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_both_loaders_of_a_trainer_are_shielded(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    options = {"packing": False, "per_device_train_batch_size": 1, "trl": {"dataloader_num_workers": 1}}
    made = parts(tiny_folder, ROWS, tmp_path, eval_data=ROWS, **options)
    loader = made.trainer.get_train_dataloader() if kind == "train" else made.trainer.get_eval_dataloader()
    batches = iter(loader.base_dataloader)
    next(batches)  # it is at work: Python forgets a signal that comes right behind a fork
    (worker,) = batches._workers
    os.kill(worker.pid, INT)
    worker.join(timeout=1)
    assert worker.is_alive()
    assert len(list(batches)) == len(ROWS) - 1, "two batches are fetched ahead; the others need the worker"


def test_a_resumed_runs_loader_keeps_its_workers_shielded() -> None:
    loader = shield_workers(DataLoaderShard(TensorDataset(torch.arange(6)), batch_size=2, num_workers=1))
    rest = skip_first_batches(loader, 1)
    batches = iter(rest.base_dataloader)
    (worker,) = (w.pid for w in batches._workers)
    os.kill(worker, INT)
    assert [b[0].tolist() for b in batches] == [[2, 3], [4, 5]]


def test_a_signal_that_comes_while_a_worker_starts_is_not_lost() -> None:
    told: list[int] = []
    former = signal.signal(signal.SIGINT, lambda number, frame: told.append(number))
    try:
        loader = shield_workers(DataLoaderShard(TensorDataset(torch.arange(6)), batch_size=2, num_workers=1))
        process = loader.multiprocessing_context.Process(target=os.getpid)
        launch = process._Popen

        def interrupted(process_object: Any) -> Any:
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)  # no other thread may take it
            assert told == []
            return launch(process_object)

        process._Popen = interrupted
        process.start()
        process.join()
    finally:
        signal.signal(signal.SIGINT, former)
    assert told == [signal.SIGINT]


def test_a_loader_without_workers_is_left_as_it_is() -> None:
    loader = DataLoaderShard(TensorDataset(torch.arange(6)), batch_size=2)
    assert shield_workers(loader) is loader
    assert loader.worker_init_fn is None and loader.multiprocessing_context is None
