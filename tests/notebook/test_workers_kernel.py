"""``gpus = 2`` in a cell of a real kernel: rows of the notebook, live view, ■ once and twice, and what works then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil

from tests.notebook.kernels import Kernel

CELL = """%%finetune run1{flags}
model = "{model}"
data = "$rows"
gpus = 2
max_steps = 5000
max_length = 96
per_device_train_batch_size = 1
effective_batch_size = {batch}
packing = false
"""
START = """
%load_ext nbqlora
import json
rows = json.load(open("rows.json"))
"""
STEP, STOPPING = r"· step \d+/5000", "stopping after this step"


def test_two_ranks_from_a_cell(tiny_folder: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(tiny_rows * 8))
    with Kernel(tmp_path) as kernel:
        kernel.run(START)
        first = kernel.run(CELL.format(flags="", model=tiny_folder, batch=4), interrupt_at=[STEP])
        assert first.error == "", first
        assert STOPPING in first.text and "run1: stopped (interrupted)" in first.text
        assert "Traceback" not in first.text and "by rank " in first.text
        assert left(kernel) == []
        held = kernel.run("import torch; print(run1._session.loaded, torch.distributed.is_initialized())")
        assert held.text.split() == ["None", "False"]
        saved = int(kernel.run("print(run1.report.steps[-1].step)").text)
        cell = CELL.format(flags=" --resume", model=tiny_folder, batch=4)
        second = kernel.run(cell, interrupt_at=[STEP])
        assert second.error == "" and f"resumed after step {saved} of 5000" in second.text
        assert int(kernel.run("print(run1.report.steps[-1].step)").text) > saved
        assert kernel.run('print(type(run1.chat("sun", max_new_tokens=4)).__name__)').text.split() == ["Answer"]
        # A step of 96 rows takes a second or more: time for a second interrupt within it.
        twice = kernel.run(
            CELL.format(flags="", model=tiny_folder, batch=96).replace("run1", "run2"), interrupt_at=[STEP, STOPPING]
        )
        kept = "the adapter is in runs/run2/adapter"
        assert twice.error == f"InterruptedRunError: interrupted in the middle of a step; {kept}"
        assert left(kernel) == []


def left(kernel: Kernel) -> list[psutil.Process]:
    return [p for p in psutil.Process(kernel.pid).children() if p.status() != "zombie"]
