"""``gpus = 2`` in a cell of a real kernel, on two cards: who holds memory, ■, a killed rank, a card that is full.

Prints when each phase began, in seconds since the cell was run. The same body runs with two gloo processes on a CPU
(``-m slow``), to find here what can be wrong; CI has that in smaller tests. ``NBQLORA_CELL_MODEL`` names the folder of
another model, a larger one for its times.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from nbqlora.core.units import MIB
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, find_checkpoints, first_whole
from tests.gpu.cell_on_cards import LATER, SLACK, START, STEPS, Notebook, ballast, used_bytes
from tests.notebook.kernels import Kernel

OWN = 'import torch; mine = torch.ones(256, device="cuda:0"); print(torch.cuda.memory_allocated())'
# The others get 5 s to end by themselves, and both are looked after every 0.2 s.
ENDED_SECONDS = 12.0
ON_CARDS = [pytest.param("cuda", marks=pytest.mark.gpu)]
# Some GiB of activations for the model of these tests.
LONG = {"length": 1024, "rows": 8}
EITHER = [*ON_CARDS, pytest.param("cpu", marks=pytest.mark.slow)]


@contextmanager
def opened(device: str, folder: Path, request: pytest.FixtureRequest) -> Iterator[Notebook]:
    if device == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip(f"needs two cards, and {torch.cuda.device_count()} can be seen")
    model = request.getfixturevalue("medium_folder" if device == "cuda" else "tiny_folder")
    rows = [{"prompt": f"say {i}", "completion": "sun moon river " * (5 + i)} for i in range(64)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    with Kernel(folder, environ=alone) as kernel:
        assert kernel.run(START).error == ""
        yield Notebook(kernel, folder, model, device)


@pytest.mark.parametrize("device", EITHER)
def test_a_cell_on_two_cards(device: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with opened(device, tmp_path, request) as notebook:
        _stopped(notebook, fresh=True)
        _resumed(notebook)
        _killed(notebook)
        _asked(notebook, own_bytes=0)


@pytest.mark.parametrize("device", EITHER)
def test_with_cuda_started_in_the_kernel_before(device: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with opened(device, tmp_path, request) as notebook:
        own_bytes = int(notebook.kernel.run(OWN).text) if notebook.on_cards else 0
        notebook.used = used_bytes()
        _stopped(notebook, fresh=False)
        if notebook.on_cards:
            assert notebook.facts("run1")["allocated"] == own_bytes > 0
        _asked(notebook, own_bytes=own_bytes)


def _stopped(notebook: Notebook, *, fresh: bool) -> None:
    """■ in mid-training ends after the step, saved. What the kernel had started on a card would still be there."""

    def act() -> None:
        notebook.look_at_workers()
        notebook.kernel.interrupt()

    said = notebook.cell("run1", act=act)
    assert said.error == "" and "run1: stopped (interrupted)" in said.text, said
    assert "Traceback" not in said.text
    notebook.nothing_left()
    found = notebook.facts("run1")
    assert (found["status"], found["n_cards"], len(found["peaks"])) == ("stopped", 2, 2)
    assert (found["device"], found["model"]) == ("cuda" if notebook.on_cards else "cpu", False)
    assert min(found["peaks"]) > 0 and found["started"] == (notebook.on_cards and not fresh)
    assert found["losses"] and all(map(math.isfinite, found["losses"]))
    print(f"\n  seconds after the cell: {json.dumps(notebook.times('run1'))}")


def _resumed(notebook: Notebook) -> None:
    saved = notebook.facts("run1")["steps"][-1]
    said = notebook.cell("run1", " --resume", act=notebook.kernel.interrupt)
    assert said.error == "" and f"resumed after step {saved} of {STEPS}" in said.text, said
    found = notebook.facts("run1")
    assert found["steps"] == list(range(1, found["steps"][-1] + 1)) and found["steps"][-1] > saved
    notebook.nothing_left()


def _killed(notebook: Notebook) -> None:
    """The reason within seconds, where NCCL would wait for 30 minutes; what was saved is whole."""
    killed_at: list[float] = []

    def act() -> None:
        notebook.workers()[1].kill()
        killed_at.append(time.monotonic())

    said = notebook.cell("run2", until=LATER, act=act)
    seconds = time.monotonic() - killed_at[0]
    print(f"\n  the cell ended {seconds:.1f} s after the kill")
    assert said.error.startswith("TrainingError: rank 1 of 2 was killed (SIGKILL)"), said
    assert re.search(rf"write %%finetune run2 --resume to go on after step \d+ of {STEPS}", said.error)
    assert seconds < ENDED_SECONDS
    notebook.nothing_left()
    found, unreadable = find_checkpoints(notebook.folder / "runs" / "run2" / CHECKPOINTS_FOLDER)
    best, damaged = first_whole(found)
    assert best is not None and best.step >= 1 and not unreadable and not damaged


def _asked(notebook: Notebook, *, own_bytes: int) -> None:
    """``.chat`` and ``%vram`` in the kernel, and its memory back behind them."""
    kernel = notebook.kernel
    shown = kernel.run("%vram").text
    assert not notebook.on_cards or re.search(r"card 0  .*\n\s*card 1  ", shown), shown
    answered = kernel.run('print(type(run1.chat("sun", max_new_tokens=4)).__name__)')
    assert answered.text.split()[-1:] == ["Answer"], answered  # behind what libraries warn of
    assert notebook.facts("run1")["model"]
    freed = kernel.run("%vram --free")
    assert freed.error == "", freed
    found = notebook.facts("run1")
    assert not found["model"] and found["allocated"] - own_bytes <= SLACK
    if notebook.on_cards:
        print(f"\n  bytes allocated in the kernel: {found['allocated']}, {own_bytes} of them its own")
        print(f"  MiB in use, before and now: {[[n // MIB for n in each] for each in (notebook.used, used_bytes())]}")
        assert used_bytes()[1] - notebook.used[1] <= SLACK


@pytest.mark.parametrize("device", ON_CARDS)
@pytest.mark.parametrize("phase", ["training", "loading"])
def test_a_card_that_another_process_fills(
    phase: str, device: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The other rank has room all the while. Both go on with less, or both end with the reason."""
    with opened(device, tmp_path, request) as notebook, ballast(card=1, leave=96 * MIB) as fill:
        notebook.used = used_bytes()
        said = notebook.cell("run3", until=f"run3: {phase}", act=fill, steps=6, **LONG)
        print(f"\n  filled while {phase}: {said.error or 'it trained all the same'}")
        if said.error:
            assert re.match(r"(DoesNotFitError|MemoryExhaustedError): rank 1 of 2", said.error), said
        else:
            found = notebook.facts("run3")
            assert (found["status"], found["steps"]) == ("done", list(range(1, 7)))
            assert all(map(math.isfinite, found["losses"])) and "out of memory" in said.text
        fill.give_back()
        notebook.nothing_left()
