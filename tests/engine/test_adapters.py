"""The flat adapter buffer and its optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbqlora.engine.adapters import ALIGNED, FlatAdapters
from nbqlora.engine.fused import engine_of
from nbqlora.engine.optimize import optimize
from nbqlora.engine.optimizer import make_optimizer
from tests.engine.test_fused_families import BATCHES, family_model
from tests.tiny import lora_parameters


def parameters() -> list[torch.nn.Parameter]:
    numbers = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=numbers)) for shape in ((4, 24), (4, 24), (2, 24), (9, 4))]


def flat(dtype: torch.dtype = torch.bfloat16) -> FlatAdapters:
    return FlatAdapters(parameters(), [False, True, True, False], dtype)


def test_values_stay_and_neighbours_are_one_matrix() -> None:
    before, adapters = parameters(), flat()
    for parameter, value in zip(adapters.parameters, before, strict=True):
        assert torch.equal(parameter, value)
    a = adapters.parameters[:3]
    assert torch.equal(adapters.stacked_copy(a), torch.cat(list(a)).to(torch.bfloat16))
    assert adapters._offset[id(adapters.parameters[3])] % ALIGNED == 0


def test_the_copy_follows_the_parameters_and_in_fp32_is_they() -> None:
    adapters = flat()
    with torch.no_grad():
        adapters.parameters[0].mul_(2)
    assert not torch.equal(adapters.copy_of(adapters.parameters[0]), adapters.parameters[0].to(torch.bfloat16))
    adapters.refresh()
    assert torch.equal(adapters.copy_of(adapters.parameters[0]), adapters.parameters[0].to(torch.bfloat16))
    exact = flat(torch.float32)
    assert exact.copy_of(exact.parameters[0]).data_ptr() == exact.parameters[0].data_ptr()


def test_gradients_begin_at_zero_where_there_were_none() -> None:
    adapters = flat()
    adapters.begin_gradients()
    adapters.all_gradients().fill_(3.0)
    adapters.parameters[1].grad = None
    adapters.parameters[2].grad = torch.full_like(adapters.parameters[2], 7.0)
    adapters.begin_gradients()
    assert [float(p.grad.mean()) for p in adapters.parameters] == [3.0, 0.0, 7.0, 3.0]
    assert adapters.has_gradients(adapters.parameters)
    for parameter in adapters.parameters:
        parameter.grad = None
    assert adapters.gathered() is None and not adapters.has_gradients(adapters.parameters)
    adapters.begin_gradients()
    assert not adapters.all_gradients().any()


def step_both(optim: str, ours: Any, stock: Any, steps: int = 3) -> None:
    for _ in range(steps):
        for model, optimizer in (ours, stock):
            model(**BATCHES["packed"], use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch"])
def test_one_flat_step_is_a_step_of_each(optim: str) -> None:
    ours, stock = family_model("llama"), family_model("llama")
    optimize(ours)
    optimize(stock)
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    reference = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], **settings)
    adapters = engine_of(ours).scratch.adapters
    optimizer = make_optimizer(adapters, [], optim=optim, learning_rate=1e-2, weight_decay=0.1)
    step_both(optim, (ours, optimizer), (stock, reference))
    expected = lora_parameters(stock)
    for name, parameter in lora_parameters(ours).items():
        assert torch.allclose(parameter, expected[name], rtol=1e-4, atol=1e-6), name


def test_eight_bit_states_learn_the_same_thing() -> None:
    ours, stock = family_model("llama"), family_model("llama")
    optimize(ours)
    optimize(stock)
    adapters = engine_of(ours).scratch.adapters
    optimizer = make_optimizer(adapters, [], optim="adamw_8bit", learning_rate=1e-3)
    reference = torch.optim.AdamW([p for p in stock.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    before = {n: p.detach().clone() for n, p in lora_parameters(ours).items()}
    step_both("adamw_8bit", (ours, optimizer), (stock, reference))
    moved = torch.cat([(p - before[n]).flatten() for n, p in lora_parameters(ours).items()])
    expected = torch.cat([(p - before[n]).flatten() for n, p in lora_parameters(stock).items()])
    assert (moved - expected).norm() < 0.2 * expected.norm()
    state = optimizer.state[optimizer.flat]
    assert state["state1"].dtype == torch.uint8


def test_a_step_without_a_backward_changes_nothing() -> None:
    model = family_model("llama")
    optimize(model)
    optimizer = make_optimizer(engine_of(model).scratch.adapters, [], optim="adamw_torch", learning_rate=1e-2)
    model(**BATCHES["packed"], use_cache=False).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    before = engine_of(model).scratch.adapters.master.clone()
    optimizer.step()
    assert torch.equal(engine_of(model).scratch.adapters.master, before)
