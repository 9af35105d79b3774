"""What ``vram()`` says, and what it must not do to say it."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nbqlora.core.specs import MemoryCategory as M
from nbqlora.memory.nvml import WORKER_MODULE, is_worker
from nbqlora.memory.probe import vram
from nbqlora.memory.split import split_card, split_host

GIB = 1 << 30
UNSEEN = "NVML shows no processes here: context includes what other programs hold"
UseNvml = Callable[..., None]


@pytest.mark.parametrize(
    ("figures", "expected", "n_notes"),
    [
        # used, allocated, reserved, own, others -> this process, context, cache, others
        ((60, 40, 50, 54, 6), (40, 4, 10, 6), 0),
        ((60, 40, 50, None, 6), (40, 4, 10, 6), 0),  # only the others are listed
        ((60, 40, 50, None, 0), (40, 10, 10, 0), 0),
        ((60, 40, 50, None, None), (40, 10, 10, 0), 1),  # a container: nothing is listed
        ((60, 40, 50, None, 59), (40, 10, 10, 0), 1),  # we are listed under the host's number
        ((60, 40, 50, 3, None), (40, 10, 10, 0), 1),  # somebody else has our number
        ((60, 40, 50, 99, 0), (40, 10, 10, 0), 0),  # NVML read a moment later
        ((30, 40, 50, 54, 6), (30, 0, 0, 0), 0),  # used read before a large allocation
        ((0, 0, 0, None, None), (0, 0, 0, 0), 1),
    ],
)
def test_a_card_split(figures: tuple[Any, ...], expected: tuple[int, ...], n_notes: int) -> None:
    names = ("used_bytes", "allocated_bytes", "reserved_bytes", "own_bytes", "others_bytes")
    parts, notes = split_card(**dict(zip(names, figures, strict=True)))
    assert tuple(parts[c] for c in (M.THIS_PROCESS, M.CONTEXT, M.CACHE, M.OTHER_PROCESSES)) == expected
    assert sum(parts.values()) == figures[0]
    assert len(notes) == n_notes


@pytest.mark.parametrize(
    ("holdings", "expected"),
    [
        ({}, {M.THIS_PROCESS: 40}),
        ({M.WEIGHTS: 25, M.ADAPTER: 5}, {M.WEIGHTS: 25, M.ADAPTER: 5, M.THIS_PROCESS: 10}),
        ({M.WEIGHTS: 35, M.OPTIMIZER: 9}, {M.WEIGHTS: 35, M.OPTIMIZER: 5, M.THIS_PROCESS: 0}),
    ],
)
def test_what_a_run_says_it_holds(holdings: dict[M, int], expected: dict[M, int]) -> None:
    card, _ = split_card(
        used_bytes=60, allocated_bytes=40, reserved_bytes=50, own_bytes=55, others_bytes=5, holdings=holdings
    )
    assert card == {**expected, M.CONTEXT: 5, M.CACHE: 10, M.OTHER_PROCESSES: 5}
    host = split_host(used_bytes=70, process_bytes=40, holdings=holdings)
    assert host == {**expected, M.OTHER_PROCESSES: 30}


def test_a_process_with_more_mapped_than_is_used() -> None:
    assert split_host(used_bytes=30, process_bytes=40) == {M.THIS_PROCESS: 30, M.OTHER_PROCESSES: 0}


def test_on_this_machine(tmp_path: Path) -> None:
    report = vram(holdings={M.WEIGHTS: 1 << 20}, disk_path=tmp_path / "runs/run1")
    assert sum(report.by_category.values()) == report.used_bytes
    assert report.used_bytes + report.free_bytes == report.total_bytes
    assert report.by_category[M.WEIGHTS] == 1 << 20
    assert report.disk_path == str(tmp_path / "runs/run1") and report.disk_free_bytes > 0
    assert 0 < report.process_bytes < report.host_total_bytes


def test_it_is_quick() -> None:
    vram()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        vram()
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


@pytest.mark.parametrize(
    ("before", "check"),
    [
        ("", "'torch' not in sys.modules"),
        ("import torch", "not torch.cuda.is_initialized()"),
    ],
)
def test_asking_starts_nothing(before: str, check: str) -> None:
    code = f"import sys\n{before}\nfrom nbqlora.memory.probe import vram\nr = vram()\nassert {check}\n"
    code += "assert r.measured_by in ('nvml', 'os') and sum(r.by_category.values()) == r.used_bytes"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


class FakeCuda:
    """torch.cuda of a process that uses card 1 of 2."""

    def __init__(self, *, broken: bool = False) -> None:
        self.broken = broken

    def is_initialized(self) -> bool:
        return True

    def current_device(self) -> int:
        return 1

    def device_count(self) -> int:
        return 2

    def get_device_properties(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(uuid=f"b{index}")

    def get_device_name(self, index: int) -> str:
        return "Tesla T4"

    def mem_get_info(self, index: int) -> tuple[int, int]:
        if self.broken:
            raise RuntimeError("CUDA error: device-side assert triggered\nlong advice")
        return 9 * GIB, 15 * GIB

    def memory_allocated(self, index: int) -> int:
        return 4 * GIB

    def memory_reserved(self, index: int) -> int:
        return 5 * GIB

    def max_memory_allocated(self, index: int) -> int:
        return 8 * GIB


def use_torch(monkeypatch: pytest.MonkeyPatch, cuda: Any, *, built: bool = True) -> None:
    backends = SimpleNamespace(cuda=SimpleNamespace(is_built=lambda: built))
    fake = SimpleNamespace(cuda=cuda, backends=backends, __version__="2.13.0+cpu")
    monkeypatch.setitem(sys.modules, "torch", fake)


def test_torch_figures_of_its_own_card(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml({"uuid": "GPU-b0"}, {"uuid": "GPU-b1", "processes": {os.getpid(): 5.25 * GIB, 1: 0.75 * GIB}})
    use_torch(monkeypatch, FakeCuda())
    report = vram(holdings={M.WEIGHTS: 3 * GIB})
    assert (report.kind, report.measured_by, report.name) == ("cuda", "torch", "Tesla T4")
    assert report.by_category == {
        M.WEIGHTS: 3 * GIB,
        M.THIS_PROCESS: GIB,
        M.CONTEXT: GIB // 4,
        M.CACHE: GIB,
        M.OTHER_PROCESSES: 0.75 * GIB,
    }
    assert sum(report.by_category.values()) == report.used_bytes == 6 * GIB
    assert report.peak_bytes == 8 * GIB
    assert report.notes[0] == "2 cards, this is card 1"


def test_torch_without_nvml(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(init_error="Driver Not Loaded")
    use_torch(monkeypatch, FakeCuda())
    report = vram()
    assert report.by_category[M.CONTEXT] == GIB and report.by_category[M.OTHER_PROCESSES] == 0
    assert report.notes[:2] == ("2 cards, this is card 1", UNSEEN)


def test_after_a_cuda_fault_nvml_answers(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml({"uuid": "GPU-b0", "used": 6 * GIB, "processes": {os.getpid(): 5 * GIB}})
    use_torch(monkeypatch, FakeCuda(broken=True))
    report = vram()
    assert (report.measured_by, report.used_bytes) == ("nvml", 6 * GIB)
    assert report.by_category == {M.THIS_PROCESS: 5 * GIB, M.OTHER_PROCESSES: GIB}
    fault = "CUDA is broken in this process (CUDA error: device-side assert triggered): restart the kernel"
    assert report.notes[0] == fault


def test_before_cuda_starts_nvml_answers(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml({"uuid": "GPU-b0", "used": 2 * GIB}, {"uuid": "GPU-b1"})
    use_torch(monkeypatch, SimpleNamespace(is_initialized=lambda: False))
    report = vram()
    assert (report.kind, report.measured_by, report.peak_bytes) == ("cuda", "nvml", 0)
    assert report.by_category == {M.THIS_PROCESS: 0, M.OTHER_PROCESSES: 2 * GIB}
    assert report.notes[0] == "2 cards, this is the first"


@pytest.fixture
def worker() -> Iterator[int]:
    """A process with the command line of a run's worker, which waits to be told something."""
    ours, theirs = Pipe()
    command = [sys.executable, "-m", WORKER_MODULE, str(theirs.fileno())]
    with ours, theirs, subprocess.Popen(command, pass_fds=[theirs.fileno()], start_new_session=True) as process:
        while not is_worker(process.pid):  # exec comes a moment after the fork
            time.sleep(0.01)
        yield process.pid
        process.kill()


def test_each_of_several_cards_with_the_workers_of_runs(
    use_nvml: UseNvml, worker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_torch(monkeypatch, SimpleNamespace(is_initialized=lambda: False))
    held = {os.getpid(): GIB, worker: 4 * GIB, 1: GIB}
    use_nvml({"uuid": "GPU-b0"}, {"uuid": "GPU-b1", "used": 6 * GIB, "processes": held})
    idle, full = vram().cards
    assert (idle.name, idle.used_bytes, idle.own_bytes, idle.workers_bytes) == ("Tesla T4", 0, None, None)
    assert (full.used_bytes, full.own_bytes, full.workers_bytes) == (6 * GIB, GIB, 4 * GIB)
    use_nvml({"uuid": "GPU-b0"})
    assert vram().cards == ()


def test_a_workers_command_line_is_known() -> None:
    from nbqlora.run.workers import worker

    assert worker.__name__ == WORKER_MODULE


@pytest.mark.parametrize("half_imported", [False, True])
def test_a_torch_that_cannot_use_the_card(
    use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch, half_imported: bool
) -> None:
    use_nvml({"uuid": "GPU-b0"})
    if half_imported:  # by another thread: nothing is known of it yet
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace())
    else:
        use_torch(monkeypatch, SimpleNamespace(is_initialized=lambda: False), built=False)
        monkeypatch.setattr("nbqlora.memory.probe._DRIVER", Path("/dev/null"))
    report = vram()
    assert report.measured_by == ("nvml" if half_imported else "os")
    if not half_imported:
        assert report.notes[0] == "Tesla T4 is not used: torch 2.13.0+cpu finds no CUDA"
