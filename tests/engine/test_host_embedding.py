"""An embedding in host memory: the same rows, the same step, and no parameter of it on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nbqlora.core.errors import ModelError
from nbqlora.engine.fused import engine_of
from nbqlora.engine.host_embedding import ROWS_AT_ONCE, HostEmbedding, embedding_is_on_host, embedding_to_host
from nbqlora.engine.optimize import optimize, restore
from tests import tiny


@pytest.mark.parametrize("shape", [(1, 7), (3, 5), (1, ROWS_AT_ONCE), (2, ROWS_AT_ONCE + 3), (5 * ROWS_AT_ONCE + 1,)])
def test_rows_are_those_of_the_matrix(shape: tuple[int, ...]) -> None:
    weight = torch.randn(300, 16)
    ids = torch.randint(0, 300, shape, generator=torch.Generator().manual_seed(0))
    look_up = HostEmbedding(weight, torch.device("cpu"))
    for _ in range(2):  # parts are used again
        assert torch.equal(look_up(ids), weight[ids])


def model_of(**shape: Any) -> Any:
    return tiny.with_lora(tiny.make_model(**{"num_hidden_layers": 2, **shape}))


def step(model: Any) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**tiny.packed_batch(), use_cache=False).loss
    loss.backward()
    return float(loss), {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_bit_equal_and_the_parameter_is_gone(fused: bool) -> None:
    model = model_of(tie_word_embeddings=False)
    model.train()
    if fused:
        optimize(model)
        assert engine_of(model) is not None
    loss, gradients = step(model)
    n_params = sum(p.numel() for p in model.parameters())
    assert not embedding_is_on_host(model)
    told = embedding_to_host(model)
    assert embedding_is_on_host(model) and told.path == "embedding" and told.new == "in host memory"
    found = step(model)
    assert found[0] == loss and all(torch.equal(found[1][n], gradients[n]) for n in gradients)
    table = model.get_input_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == n_params - table.numel()
    assert not any("embed_tokens" in name for name, _ in model.named_parameters())
    restore(model, own_storage=False)  # a card that may be full
    assert embedding_is_on_host(model)
    model.eval()
    out = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 6)
    restore(model)
    module = model.get_input_embeddings()
    assert not embedding_is_on_host(model) and sum(p.numel() for p in model.parameters()) == n_params
    assert torch.equal(module.weight, table) and "forward" not in vars(module)
    model.train()
    assert step(model)[0] == pytest.approx(loss, rel=1e-5)


def test_what_cannot_go_there_is_refused_with_the_setting() -> None:
    with pytest.raises(ModelError, match=r"the head shares its matrix; set offload_embedding = false"):
        embedding_to_host(model_of(tie_word_embeddings=True))
    trained = model_of(tie_word_embeddings=False)
    trained.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(ModelError, match="it is trained"):
        embedding_to_host(trained)
