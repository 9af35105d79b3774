"""Every family's fused layers against transformers and PEFT: loss and every LoRA gradient, packed and padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbqlora.core.families import FAMILIES
from nbqlora.engine.fused import engine_of
from nbqlora.engine.optimize import NEW, optimize, restore
from tests.tiny import lora_parameters, make_model, packed_batch, padded_batch, with_lora

BATCHES = {"padded": padded_batch(rows=3), "packed": packed_batch(lengths=(19, 24, 1, 7))}


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in lora_parameters(model).items()}


def assert_same(found: Any, expected: Any, *, tolerance: float = 2e-5) -> None:
    assert torch.isclose(found[0], expected[0], rtol=tolerance)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        off = (found[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert off < 10 * tolerance, f"{name} is off by {off:.1e}"
        assert gradient.norm() > 0, name


def family_model(family: str, **changes: Any) -> Any:
    extra = {"attn_logit_softcapping": 0.8} if family == "gemma2" else {}
    model = make_model(family, **extra)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # the only one of transformers' that caps scores
    return with_lora(model, **changes).train()


@pytest.mark.parametrize("layout", BATCHES)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_fused_family_is_the_stock_one(family: str, layout: str) -> None:
    model = family_model(family)
    expected = loss_and_gradients(model, BATCHES[layout])
    made = optimize(model)
    assert [r.new for r in made] == [NEW], made
    engine = engine_of(model)
    assert engine is not None and engine.complete
    assert_same(loss_and_gradients(model, BATCHES[layout]), expected)
    restore(model)
    assert engine_of(model) is None
    assert_same(loss_and_gradients(model, BATCHES[layout]), expected, tolerance=1e-6)
