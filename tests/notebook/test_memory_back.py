"""Memory that comes back: in one kernel, behind a stop, an error and a card that stays full, a run begins as the first.

By weak references to everything that a run loaded, and by the bytes of all tensors, while IPython keeps each error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.notebook.kernels import Kernel, Said

START = """
%load_ext nbqlora
import gc, json, sys, weakref
import torch, transformers
from nbqlora.memory import profile
rows = json.load(open("rows.json"))
bad = rows[:11] + [{"messages": [{"role": "user", "content": "~"}, {"role": "assistant", "content": "bad"}]}]
watched, tables = [], []  # tables: what libraries keep for as long as the process lives, made by the first run

def tensors():
    gc.collect()
    return [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]

def watch(model):
    # The miniature that is probed before anything is loaded is passed over.
    if not watched and any(type(p).__name__ == "Params4bit" for p in model.parameters()):
        watched.extend(weakref.ref(t) for t in tensors() if not any(t is table for table in tables))

def alive():
    gc.collect()
    found = (len(watched), sum(reference() is not None for reference in watched))
    watched.clear()
    return found

forward = transformers.LlamaModel.forward
def watched_forward(self, *args, **kwargs):
    out = forward(self, *args, **kwargs)
    if self.training:
        watch(self)
    return out
transformers.LlamaModel.forward = watched_forward
"""
CELL = """%%finetune {name}
model = "{model}"
data = "${data}"
max_steps = {steps}
max_length = 96
packing = false
effective_batch_size = 4
[trl]
eval_on_start = false
train_sampling_strategy = "sequential"
"""
FAILING = """
steps = [0]
def failing(self, *args, **kwargs):
    steps[0] += self.training and bool(watched)
    if steps[0] > 6:
        there = torch.ones(2**20)  # what a frame of the error holds
        raise {error}
    return watched_forward(self, *args, **kwargs)
transformers.LlamaModel.forward = failing
"""
FULL = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")'
FAULT = 'RuntimeError("CUDA error: an illegal memory access was encountered")'
BYTES = "print(sum(t.nbytes for t in tensors()), 'watched and alive', *alive())"


@pytest.fixture
def rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps(tiny.make_rows(200)))


def left(kernel: Kernel) -> int:
    """Bytes of all tensors; of those that the last run had, none is left."""
    n_bytes, _, n_watched, n_alive = kernel.run(BYTES).text.replace("watched and alive", "-").split()
    assert int(n_watched) > 60 and int(n_alive) == 0
    return int(n_bytes)


@pytest.mark.parametrize("kernel_packages", ["installed", pytest.param("colab", marks=pytest.mark.slow)], indirect=True)
def test_a_run_begins_with_the_memory_of_the_first(kernel_packages: Path | None, rows: None, tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", bad_token="~")
    with Kernel(tmp_path, kernel_packages) as kernel:
        assert kernel.run(START).error == ""

        def cell(name: str, data: str = "rows", steps: int = 3, **how: Any) -> Said:
            return kernel.run(CELL.format(name=name, data=data, steps=steps, model=model), **how)

        assert cell("run1").error == ""
        assert int(kernel.run("print(sum(t.nbytes for t in tensors()))").text) > 100_000, "the run holds its model"
        kernel.run("run1.free(); tables = tensors(); watched.clear()")
        first = int(kernel.run("print(sum(t.nbytes for t in tables))").text)
        assert first < 8192

        assert cell("run2", steps=100_000, interrupt_at=[r"· step \d+/100000"]).error == ""
        assert kernel.run("print(run2.status)").text.strip() == "stopped"
        said = kernel.run("%vram --free")
        assert "run2" in said.text.split("finished runs")[1]
        assert left(kernel) == first

        assert cell("run3", data="bad").error.startswith("NonFiniteLossError: the loss of step 3 is not finite")
        assert left(kernel) == first

        kernel.run(FAILING.format(error=FAULT))
        said = cell("fault", steps=100)
        assert said.error.startswith("RuntimeError: CUDA error") and any("Traceback" in line for line in said.shown)
        # IPython keeps this error with all its frames, and torch's closures in them the ids of the last batch.
        assert left(kernel) < first + 8192
        kernel.run("%vram --free")
        assert int(kernel.run("print(sum(t.nbytes for t in tensors()))").text) == first

        kernel.run(FAILING.format(error=FULL))
        said = cell("run4", steps=100)
        assert "memory ran out" in said.error and "all memory of this run was given back" in said.error, said
        assert len(said.shown) <= 8, said.shown
        assert left(kernel) == first

        kernel.run("transformers.LlamaModel.forward = watched_forward")
        assert cell("run5", steps=1).error == ""
        kernel.run("run5.free()")
        assert left(kernel) == first
