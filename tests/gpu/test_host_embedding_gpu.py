"""An embedding in host memory, on a card: the same step, less memory, no graph; and what a long lookup takes."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.engine.fused import engine_of
from nbqlora.engine.host_embedding import HostEmbedding, embedding_to_host
from tests.tiny import save_model

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_the_same_step_with_less_of_the_card(dtype: str, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"hidden_size": 1024, "vocab_size": 64000, "tie_word_embeddings": False}
    loaded = nbqlora.load(str(save_model(tmp_path / "model", **shape)), dtype=dtype, max_length=512, lora_r=8)
    loaded.model.train()
    ids = torch.randint(0, 64000, (2, 512), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for on_host in (False, True):
        if on_host:
            held = torch.cuda.memory_allocated()
            embedding_to_host(loaded.model)
            assert held - torch.cuda.memory_allocated() >= 64000 * 1024 * 2, "the matrix is still on the card"
            loaded.run_as(loaded.plan)
        step = loaded.micro_step()
        assert step.captures != on_host
        for _ in range(3):
            loaded.model.zero_grad(set_to_none=True)
            loss = float(step({"input_ids": ids, "labels": ids}, torch.tensor(1e-3, device="cuda")))
        gradient = engine_of(loaded.model).scratch.adapters.all_gradients().clone()
        found.append((loss, gradient))
    (loss, gradient), (again, other) = found
    assert again == pytest.approx(loss, rel=1e-5) and (other - gradient).norm() < 1e-2 * gradient.norm()


def test_many_rows_are_copied_while_others_are_looked_up() -> None:
    weight = torch.randn(128256, 4096, dtype=torch.float16)
    ids = torch.randint(0, 128256, (1, 98304), generator=torch.Generator().manual_seed(0)).cuda()
    look_up = HostEmbedding(weight, torch.device("cuda"))
    for _ in range(2):
        torch.cuda.synchronize()
        begun = perf_counter()
        rows = look_up(ids)
        torch.cuda.synchronize()
        seconds = perf_counter() - begun
    print(f"98,304 rows of 4,096: {seconds:.3f} s, {rows.nbytes / seconds / 1e9:.1f} GB/s")
    assert torch.equal(rows.cpu(), weight[ids.cpu()])
    assert seconds < 5
