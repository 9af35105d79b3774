"""A notebook that trains on two cards, seen from outside: its processes, ports and the cards' memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from nbqlora.core.units import MIB
from nbqlora.memory.nvml import WORKER_MODULE, read_cards
from tests.notebook.kernels import Kernel, Said

CELL = """%%finetune {name}{flags}
model = "{model}"
data = "rows.jsonl"
gpus = 2
max_steps = {steps}
max_length = {length}
per_device_train_batch_size = {rows}
gradient_accumulation_steps = 2
packing = false
save_minutes = 1e-9
"""
STEPS = 5000
FIRST, LATER = rf"· step \d+/{STEPS}", rf"· step ([3-9]|\d\d+)/{STEPS}"
# In the kernel: what the lines below ask it.
START = """
%load_ext nbqlora
def facts(run):
    import json, sys
    torch = sys.modules["torch"]
    report = run.report
    return "FACTS " + json.dumps({
        "status": run.status, "n_cards": run.plan.n_cards, "device": run.plan.device.kind, "peaks": report.rank_peaks,
        "losses": [e.loss for e in report.steps], "steps": [e.step for e in report.steps],
        "started": torch.cuda.is_initialized(), "model": run._session.loaded is not None,
        "allocated": torch.cuda.memory_allocated() if torch.cuda.is_initialized() else 0,
        "times": [(e.elapsed_seconds, type(e).__name__, getattr(e, "phase", "")) for e in run.events],
        "first_step": report.steps[0].seconds,
    })
"""
# What NCCL and a driver may keep for a moment longer.
SLACK = 64 * MIB
# Has a card's context already; takes all of the card but so much when a line comes, until its input ends.
TAKE = """
import sys, torch
torch.zeros(1, device="cuda")
print("ready", flush=True)
sys.stdin.readline()
held = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


class Notebook:
    """A kernel in a folder with rows, and what is seen of it from outside."""

    def __init__(self, kernel: Kernel, folder: Path, model: Path, device: str) -> None:
        self.kernel, self.folder, self.on_cards = kernel, folder, device == "cuda"
        self._model = os.environ.get("NBQLORA_CELL_MODEL", model)
        self.ports, self.used = self.listening(), used_bytes()
        self.began, self.started = 0.0, 0.0

    def cell(
        self,
        name: str,
        flags: str = "",
        *,
        act: Callable[[], None],
        until: str = FIRST,
        steps: int = STEPS,
        length: int = 256,
        rows: int = 2,
    ) -> Said:
        """Run it; ``act`` when ``until`` was said."""
        text = CELL.format(name=name, flags=flags, model=self._model, steps=steps, length=length, rows=rows)
        self.began = time.time()
        return self.kernel.run(text, interrupt_at=[until], act=act)

    def facts(self, name: str) -> dict[str, Any]:
        said = self.kernel.run(f"print(facts({name}))")
        assert "FACTS" in said.text, said
        found: dict[str, Any] = json.loads(said.text.partition("FACTS ")[2])
        return found

    def workers(self) -> dict[int, psutil.Process]:
        found = {}
        for process in psutil.Process(self.kernel.pid).children(recursive=True):
            with suppress(psutil.Error):
                if WORKER_MODULE in process.cmdline():
                    found[int(process.environ()["RANK"])] = process
        return found

    def listening(self) -> set[int]:
        ours = [psutil.Process(self.kernel.pid), *psutil.Process(self.kernel.pid).children(recursive=True)]
        found = (c for p in ours for c in p.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN)
        return {int(c.laddr.port) for c in found}

    def look_at_workers(self) -> None:
        """In mid-training: two processes, each with its card, and the kernel with none."""
        workers = self.workers()
        assert sorted(workers) == [0, 1]
        self.started = max(p.create_time() for p in workers.values()) - self.began
        if not self.on_cards:
            return
        assert [workers[rank].environ()["CUDA_VISIBLE_DEVICES"] for rank in (0, 1)] == ["0", "1"]
        grown = [now - then for now, then in zip(used_bytes(), self.used, strict=True)]
        print(f"\n  MiB of each card that the run took: {[n // MIB for n in grown]}")
        assert min(grown) > 256 * MIB

    def nothing_left(self) -> None:
        """No process, no port, and the cards as they were."""
        assert [p for p in psutil.Process(self.kernel.pid).children() if p.status() != psutil.STATUS_ZOMBIE] == []
        assert self.listening() <= self.ports
        until, now = time.monotonic() + 5, used_bytes()
        while any(b - a > SLACK for a, b in zip(self.used, now, strict=True)) and time.monotonic() < until:
            time.sleep(0.2)
            now = used_bytes()
        assert all(b - a <= SLACK for a, b in zip(self.used, now, strict=True)), (self.used, now)

    def times(self, name: str) -> dict[str, float]:
        """Seconds from the cell to each phase of its run; the first step's begin is the start of training."""
        facts, found = self.facts(name), {"workers started": self.started}
        words = {"DataEvent": "looked", "PlannedEvent": "planned", "load": "loading", "train": "loaded"}
        for at, kind, phase in facts["times"]:
            word = words.get(phase or kind)
            if word and word not in found:
                found[word] = at
        done = next(at for at, kind, _ in facts["times"] if kind == "StepEvent")
        found |= {"first step begins": done - facts["first_step"], "first step done": done}
        return {word: round(at, 1) for word, at in found.items()}


def used_bytes() -> list[int]:
    return [card.used_bytes for card in read_cards()]


class Ballast:
    """A process with a context on a card; called, it takes the rest."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._wait_for("ready")

    def __call__(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._wait_for("held")

    def _wait_for(self, word: str) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{word}\n"

    def give_back(self) -> None:
        self._process.communicate()


@contextmanager
def ballast(card: int, leave: int) -> Iterator[Ballast]:
    with subprocess.Popen(
        [sys.executable, "-c", TAKE, str(leave)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": str(card)},
    ) as process:  # fmt: skip
        try:
            yield Ballast(process)
        finally:
            process.kill()
