"""What is told of a loaded model's step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

import nbqlora
from nbqlora.engine.host_embedding import embedding_is_on_host
from nbqlora.engine.optimize import restore
from nbqlora.run.loading import prepare, told_of_the_step
from tests.tiny import save_model


def test_an_embedding_that_a_plan_has_on_the_host_is_there_and_stays(tmp_path: Path) -> None:
    loaded = nbqlora.load(str(save_model(tmp_path / "model", tie_word_embeddings=False)), max_length=32, lora_r=4)
    assert loaded.plan is not None and not embedding_is_on_host(loaded.model)
    for _ in range(2):  # a run that is planned again prepares the model again
        made = prepare(loaded, replace(loaded.plan, offload_embedding=True))
        assert embedding_is_on_host(loaded.model)
    assert "embedding" not in {r.path for r in made}, "moved once"
    optimizer = loaded.optimizer(learning_rate=1e-2)
    ids = torch.randint(0, 200, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = [float(loaded.train_step(optimizer, input_ids=ids, labels=ids)) for _ in range(6)]
    assert losses[-1] < losses[0]


def test_a_step_that_cannot_be_captured_says_why(tiny_folder: Path) -> None:
    loaded = nbqlora.load(str(tiny_folder), max_length=32, lora_r=4)
    assert told_of_the_step(loaded) == (), "on a CPU the plan has said it"
    restore(loaded.model)
    (told,) = told_of_the_step(replace(loaded, device=torch.device("cuda"), _step=None))
    assert (told.path, told.new, told.because) == ("step", "", "not every layer is a fused one")
