"""200 steps on fused layers follow the loss curve of transformers' and PEFT's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.engine.optimize import NEW, optimize
from nbqlora.engine.surgery import keep_linears_trainable
from tests.tiny import load_nf4, packed_batch, save_model, with_lora

STEPS = 200


def curve(model: Any, batches: list[dict[str, torch.Tensor]], learning_rate: float) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    losses = []
    for batch in batches:
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def assert_follows(fused: list[float], stock: list[float]) -> None:
    """Step by step at first, where nothing has grown yet; in the mean of ten steps after that."""
    assert fused[:20] == pytest.approx(stock[:20], rel=1e-4)
    means = [(sum(x[i : i + 10]) / 10 for i in range(0, STEPS, 10)) for x in (fused, stock)]
    for ours, theirs in zip(*means, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-2)


def test_the_tiny_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "llama")
    few = [packed_batch(lengths=(19, 24, 7), seed=i) for i in range(8)]
    batches = [few[i % 8] for i in range(STEPS)]
    models = [with_lora(load_nf4(folder), lora_dropout=0.0).train() for _ in range(2)]
    for model in models:
        keep_linears_trainable(model)
    assert optimize(models[0])[0].new == NEW
    fused, stock = (curve(model, batches, 3e-3) for model in models)
    assert fused[-1] < 0.7 * fused[0], "nothing was learned"
    assert_follows(fused, stock)


@pytest.mark.slow
def test_the_demo_model() -> None:
    """400 steps of 64 tokens."""
    import nbqlora
    from nbqlora.engine.optimize import restore

    curves = []
    numbers = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 40000, (1, 64), generator=numbers) for _ in range(8)]
    for is_fused in (True, False):
        model = nbqlora.load("demo", max_length=64, per_device_train_batch_size=1, lora_r=8).model.train()
        if not is_fused:
            restore(model)
        batches = [{"input_ids": ids[i % 8], "labels": ids[i % 8]} for i in range(STEPS)]
        curves.append(curve(model, batches, 1e-3))
    assert_follows(*curves)
