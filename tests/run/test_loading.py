"""What is told of a loaded model's step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.engine.host_embedding import embedding_is_on_host
from nbqlora.engine.optimize import restore
from nbqlora.run.loading import prepare, told_of_the_step
from tests.tiny import save_model


def test_memory_that_runs_out_while_a_weight_is_quantized_is_said_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes as bnb

    folder, n = save_model(tmp_path / "model"), [0]
    quantize = bnb.functional.quantize_4bit

    def short(*args: Any, **kwargs: Any) -> Any:
        n[0] += 1
        if n[0] == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 3 MiB free")
        return quantize(*args, **kwargs)

    monkeypatch.setattr(bnb.functional, "quantize_4bit", short)
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory\. Tried to allocate 20\.00 MiB"):
        nbqlora.load(str(folder), max_length=32, lora_r=4)
    assert n[0] >= 3


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
