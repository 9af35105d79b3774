"""Workers are started, heard, interrupted and ended; nothing of them is left, however they end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from nbqlora.core.errors import (
    DataError,
    InterruptedRunError,
    MemoryExhaustedError,
    NbqloraError,
    RunError,
    TrainingError,
)
from nbqlora.core.events import OomEvent, StepEvent
from nbqlora.data.scratch import PREFIX
from nbqlora.run.beside import Beside
from nbqlora.run.workers import watching
from nbqlora.run.workers.starting import HOST, Workers
from nbqlora.run.workers.watching import Watch
from tests.run import stand_ins

ROOT = Path(__file__).parents[2]
said: list[str] = []


@pytest.fixture(autouse=True)
def nothing_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Handlers as in a terminal, and as they were when a test ends; no process and no folder."""
    monkeypatch.setattr(watching, "GRACE_SECONDS", 1.0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
    before = {n: signal.signal(n, h) for n, h in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, 0))}
    yield
    after = {n: signal.signal(n, former) for n, former in before.items()}
    assert list(after.values()) == [signal.default_int_handler, signal.SIG_DFL]
    assert worker_processes() == []
    assert list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*")) == []


def worker_processes(of: int | None = None) -> list[psutil.Process]:
    return [p for p in psutil.Process(of).children(recursive=True) if "run.workers.worker" in " ".join(p.cmdline())]


def run(
    work: Any,
    observe: Callable[[Any], None] = lambda event: None,
    n: int = 2,
    how: str = "do this",
    prepare: Any = stand_ins.nothing,
) -> tuple[list[Any], Watch, int]:
    """Reports, the watch, and the port where they met."""
    said.clear()
    with Workers(n, prepare) as workers:
        workers.tell(work)
        watch = Watch(workers, observe, said.append, how)
        return list(watch.reports()), watch, workers.port


def failure(work: Any, n: int = 2) -> NbqloraError:
    began = time.monotonic()
    with pytest.raises(NbqloraError) as caught:
        run(work, n=n)
    assert time.monotonic() - began < 20
    return caught.value


def test_each_finds_what_torchrun_gives() -> None:
    reports, _, port = run(stand_ins.environment, n=3)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    told = [[report[name] for name in names] for report in reports]
    assert told == [[rank, rank, "3", "3", HOST, str(port)] for rank in "012"]
    assert {report["session"] for report in reports} == {"True"}
    assert str(ROOT) in reports[0]["sys.path"].split(os.pathsep)


def test_they_meet_at_a_port_that_is_closed_behind_them() -> None:
    reports, _, port = run(stand_ins.meet)
    assert reports == [3, 3]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), timeout=5)


def test_a_group_that_was_joined_ahead_is_the_first_runs() -> None:
    reports, _, _ = run(stand_ins.meet_ahead)
    first, second = [3, True, False, False, True, True], [3, False, False, False, True, True]
    assert reports == [first + second] * 2


def test_what_runs_beside_the_imports_raises_where_it_is_waited_for() -> None:
    def fails() -> str:
        raise RunError("too few cards")

    beside = Beside(fails)
    with pytest.raises(RunError, match="too few cards"):
        beside.result()
    assert Beside(lambda: "no room").result() == "no room"


def test_what_preparing_finds_is_told_before_the_work() -> None:
    events: list[Any] = []
    run(stand_ins.take_steps, events.append, prepare=stand_ins.says)
    assert [getattr(event, "text", "") for event in events] == ["of rank 0", "", ""]


def test_events_are_rank_0s_with_the_fullest_cards_peak() -> None:
    events: list[StepEvent] = []
    reports, watch, _ = run(stand_ins.take_steps, events.append)
    assert reports == ["of rank 0", "of rank 1"]
    assert [(e.step, e.loss, e.peak_bytes) for e in events] == [(1, 1.0, 4000), (2, 1.0, 4000)]
    assert watch.peaks == {0: 2000, 1: 4000}


def test_a_shortage_that_all_met_is_told_once() -> None:
    events: list[OomEvent] = []
    run(stand_ins.run_short, events.append)
    assert sorted((e.step, e.action) for e in events) == [(1, "smaller chunks"), (2, "recompute")]


def test_a_bar_of_rank_0_is_told_as_it_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "BAR_SECONDS", 0.1)
    run(stand_ins.draw)
    assert said == ["model.safetensors:  10%|###  | 10/100", "model.safetensors:  45%|###  | 45/100"]


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_is_killed_ends_all_with_the_reason(rank: int) -> None:
    error = failure(partial(stand_ins.die, rank=rank, number=signal.SIGKILL))
    assert type(error) is TrainingError
    assert str(error) == (
        f"rank {rank} of 2 was killed (SIGKILL): by somebody, or by the system because RAM ran out\n"
        "  all processes of this run were ended\n"
        "  do this to go on after step 1 of 100"
    )


def test_a_run_that_went_on_goes_on_from_the_same_checkpoint() -> None:
    assert str(failure(stand_ins.go_on_and_die)).endswith("\n  do this to go on after step 25 of 100")


def test_an_adapter_that_is_being_saved_is_waited_for() -> None:
    events: list[Any] = []
    with pytest.raises(MemoryExhaustedError, match="rank 1 of 2: no rung is left"):
        run(partial(stand_ins.save_slowly, seconds=3.0), events.append)
    assert [type(event).__name__ for event in events] == ["StepEvent", "PhaseEvent", "SavedEvent"]


def test_one_whose_other_is_gone_is_told_so() -> None:
    reports, _, _ = run(stand_ins.lose_the_other)
    assert reports[0].startswith("rank 0 of 2 has lost another one, which ended or cannot be reached: ")


def test_one_that_crashes_says_where() -> None:
    text = str(failure(partial(stand_ins.die, rank=1, number=signal.SIGSEGV)))
    assert text.startswith("rank 1 of 2 ended by SIGSEGV, and printed\n")
    assert "stand_ins.py" in text and "in die" in text


def test_one_that_leaves_without_a_word_is_told_by_what_it_printed() -> None:
    text = str(failure(stand_ins.leave))
    assert text.startswith("rank 1 of 2 ended with status 7, and printed\n    what it printed last\n  all processes")


def test_the_error_that_came_first_is_told_not_what_it_did_to_the_others() -> None:
    error = failure(partial(stand_ins.fail, rank=1, error=stand_ins.data_error()))
    assert type(error) is DataError
    assert str(error) == "rows.jsonl, line 3: no JSON", "of the data: no matter who met it"
    short = failure(partial(stand_ins.fail, rank=1, error=stand_ins.shortage()), n=3)
    assert isinstance(short, MemoryExhaustedError) and (short.tokens, short.room_bytes) == (300, 1 << 30)
    assert str(short) == "rank 1 of 3: no rung is left"


def test_an_error_of_another_kind_brings_its_traceback() -> None:
    error = failure(partial(stand_ins.fail, rank=0, error="the engine is wrong"), n=1)
    assert type(error) is TrainingError
    assert str(error) == "rank 0 of 1 failed: RuntimeError: the engine is wrong\n  all processes of this run were ended"
    assert "stand_ins.py" in error.__notes__[0]


def interrupt(number: int = signal.SIGINT) -> None:
    """As ipykernel does it: from outside the main thread."""
    thread = threading.Thread(target=os.kill, args=(os.getpid(), number))
    thread.start()
    thread.join()


class Interrupts:
    """One when the first step is told, and the next when the one before is answered."""

    def __init__(self, *numbers: int) -> None:
        self.left = list(numbers)

    def __call__(self, event: Any) -> None:
        if self.left:
            interrupt(self.left.pop(0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_reaches_each_once(number: signal.Signals, tmp_path: Path) -> None:
    reports, _, _ = run(partial(stand_ins.obey, folder=str(tmp_path), times=1), Interrupts(number))
    assert reports == [number.name] * 2


def test_so_does_a_second_one(tmp_path: Path) -> None:
    work = partial(stand_ins.obey, folder=str(tmp_path), times=2)
    reports, _, _ = run(work, Interrupts(signal.SIGINT, signal.SIGINT))
    assert reports == ["SIGINT SIGINT"] * 2


def test_a_third_one_ends_them_at_once(tmp_path: Path) -> None:
    work = partial(stand_ins.obey, folder=str(tmp_path), times=9)
    with pytest.raises(KeyboardInterrupt):
        run(work, Interrupts(*[signal.SIGINT] * 3))
    assert not list(tmp_path.glob("saved-*"))


def test_an_error_of_the_view_ends_them() -> None:
    def observe(event: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(stand_ins.wait_for_ever, observe)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_before_they_are_ready_says_so(number: signal.Signals) -> None:
    with Workers(2, partial(time.sleep, 60)) as workers, pytest.raises(InterruptedRunError) as caught:
        threading.Timer(0.5, interrupt, [number]).start()
        Watch(workers, print, print, "").reports()
    assert str(caught.value) == "interrupted before training began; nothing was saved"


# What stands for a kernel: it leads a group of its own, as a terminal and Jupyter make it.
KERNEL = """
import signal, sys
from functools import partial
from tests.run import stand_ins
from tests.run.test_workers_ends import run

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    work = partial(stand_ins.obey, folder=sys.argv[1], times=1, stubborn=int(sys.argv[2]))
    print(*run(work, lambda event: print("step", flush=True))[0], flush=True)
"""


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    started = []

    def start(stubborn: int) -> subprocess.Popen[str]:
        file = tmp_path / "kernel.py"
        file.write_text(KERNEL)
        process = subprocess.Popen(
            [sys.executable, str(file), str(tmp_path), str(stubborn)],
            env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None and process.stdout.readline() == "step\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_signals_the_whole_group_reaches_each_once_too(kernel: Any) -> None:
    process = kernel(-1)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=30)[0].splitlines()[-1] == "SIGINT SIGINT"


def test_when_the_kernel_is_killed_they_save_and_end(kernel: Any, tmp_path: Path) -> None:
    process = kernel(1)
    workers = worker_processes(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=worker_patience())
    assert alive == []
    assert [file.name for file in sorted(tmp_path.glob("saved-*"))] == ["saved-0"], "rank 1 was not willing"
    assert (tmp_path / "heard-0").read_text() == "SIGTERM\n"


def worker_patience() -> float:
    from nbqlora.run.workers.worker import LAST_SECONDS

    return LAST_SECONDS + 10  # of a busy machine


def test_a_port_and_processes_are_gone_when_one_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(FileNotFoundError):
        run(stand_ins.nothing)
