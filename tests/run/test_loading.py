"""What is told of a loaded model's step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import nbqlora
from nbqlora.engine.optimize import restore
from nbqlora.run.loading import told_of_the_step


def test_a_step_that_cannot_be_captured_says_why(tiny_folder: Path) -> None:
    loaded = nbqlora.load(str(tiny_folder), max_length=32, lora_r=4)
    assert told_of_the_step(loaded) == (), "on a CPU the plan has said it"
    restore(loaded.model)
    (told,) = told_of_the_step(replace(loaded, device=torch.device("cuda"), _step=None))
    assert (told.path, told.new, told.because) == ("step", "", "not every layer is a fused one")
