"""■ and the memory after it on the kernels between Colab's and the newest, by name: 6.31 and 7.3.

``test_interrupt.py`` and ``test_memory_back.py`` have both ends: Colab's 6.17.1 and the one that is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.notebook.kernels import BETWEEN, Kernel, folder_or_skip
from tests.notebook.test_interrupt import CELL, START, STEP, STOPPING

WATCH = """
import torch, transformers, weakref
watched, forward = [], transformers.LlamaModel.forward

def watching(self, *args, **kwargs):
    # The miniature that is probed before anything is loaded is passed over.
    if self.training and not watched and any(type(p).__name__ == "Params4bit" for p in self.parameters()):
        watched.extend(map(weakref.ref, self.parameters()))
    return forward(self, *args, **kwargs)
transformers.LlamaModel.forward = watching
"""
ALIVE = "gc.collect(); print(len(watched), sum(r() is not None for r in watched), tensor_bytes()); watched.clear()"


def test_the_installed_kernel_is_the_newest_line() -> None:
    import ipykernel

    assert tuple(map(int, ipykernel.__version__.split(".")[:2])) >= (7, 4)


@pytest.mark.parametrize("line", BETWEEN)
def test_a_stop_is_shown_and_the_memory_comes_back(
    line: str, tiny_folder: Path, tiny_rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    packages = folder_or_skip(BETWEEN[line])
    (tmp_path / "rows.json").write_text(json.dumps(tiny_rows * 20))
    with Kernel(tmp_path, packages) as kernel:
        assert kernel.run(START).text.split()[-2] == BETWEEN[line]["ipykernel"]
        assert kernel.run(WATCH).error == ""
        left = []
        for n in (1, 2):
            cell = CELL.format(n=n, model=tiny_folder, accumulation=2, workers=0)
            said = kernel.run(cell, interrupt_at=[STEP])
            assert said.error == "" and said.status == "ok", said
            assert STOPPING in said.text and f"run{n}: stopped (interrupted)" in said.text
            kernel.run(f"run{n}.free()")
            n_watched, n_alive, n_bytes = map(int, kernel.run(ALIVE).text.split())
            assert n_watched > 30 and n_alive == 0
            left.append(n_bytes)
        assert left[1] == left[0]
