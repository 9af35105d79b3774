"""■ on real kernels, the installed one and Colab's: what a real interrupt does to a cell that trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

from tests.notebook.kernels import OLD, Kernel

START = """
%load_ext nbqlora
import gc, json, sys
from importlib.metadata import version
import ipykernel, IPython
from nbqlora.notebook import live
rows = json.load(open("rows.json"))

def tensor_bytes():
    import torch
    gc.collect()
    return sum(t.nbytes for t in gc.get_objects() if issubclass(type(t), torch.Tensor))

print(ipykernel.__version__, IPython.__version__)
"""
# A step of 96 rows, one by one, takes a second or more: time for a second interrupt within it.
CELL = """%%finetune run{n}
model = "{model}"
data = "$rows"
max_steps = 100000
max_length = 96
per_device_train_batch_size = 1
gradient_accumulation_steps = {accumulation}
eval_data = "$rows"
packing = false
[trl]
dataloader_num_workers = {workers}
eval_on_start = false
"""
STEP, STOPPING = r"· step \d+/100000", "stopping after this step"


def test_interrupts_in_a_real_kernel(
    kernel_packages: Path | None, tiny_folder: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(tiny_rows * 60))
    with Kernel(tmp_path, kernel_packages) as kernel:
        asked = (OLD["ipykernel"], OLD["ipython"]) if kernel_packages else _installed()
        assert kernel.run(START).text.split()[-2:] == list(asked)
        _first(kernel, tiny_folder)
        _second(kernel, tiny_folder)
        _ordinary(kernel)


def _installed() -> tuple[str, ...]:
    code = "import ipykernel, IPython; print(ipykernel.__version__, IPython.__version__)"
    return tuple(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split())


def _first(kernel: Kernel, model: Path) -> None:
    """Ends the cell without an error, the data workers with it, and the work is there."""
    said = kernel.run(CELL.format(n=1, model=model, accumulation=2, workers=2), interrupt_at=[STEP])
    assert said.error == "", said
    assert STOPPING in said.text and "run1: stopped (interrupted)" in said.text
    assert "DataLoader worker" not in said.text and "Traceback" not in said.text
    check = 'print(run1.status, (run1.adapter_dir / "adapter_model.safetensors").exists(), repr(run1.chat("sun")))'
    assert kernel.run(check).text.split()[:2] == ["stopped", "True"]
    assert [p for p in psutil.Process(kernel.pid).children() if p.status() != "zombie"] == []


def _second(kernel: Kernel, model: Path) -> None:
    """Fails the cell in a few lines, keeps the last whole step, frees the model, leaves the kernel alive."""
    before = int(kernel.run("run1.free(); print(tensor_bytes())").text)
    cell = CELL.format(n=2, model=model, accumulation=96, workers=0)
    said = kernel.run(cell, interrupt_at=[STEP, STOPPING])
    kept = "the adapter is in runs/run2/adapter"
    assert said.error == f"InterruptedRunError: interrupted in the middle of a step; {kept}"
    assert said.shown == [said.error]
    after, bound, saved = kernel.run(
        'import os; print(tensor_bytes(), "run2" in dir(), os.listdir("runs/run2/adapter"))'
    ).text.split(maxsplit=2)
    assert (int(after), bound) == (before, "False")
    assert "adapter_model.safetensors" in saved


def _ordinary(kernel: Kernel) -> None:
    """Gets the interrupt as if no run had been."""
    said = kernel.run('print("looping", flush=True)\nwhile True:\n    pass', interrupt_at=["looping"])
    assert said.error.startswith("KeyboardInterrupt")
    assert any("Traceback" in line for line in said.shown)
    assert kernel.run("print(6 * 7)").text.strip() == "42"
