"""What a layer keeps changes the memory and nothing else: not one bit of loss or gradient."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.specs import HeadSpec, LayerPolicy
from nbqlora.engine.checkpoint import apply_policies, clear_policies, decoder_layers
from nbqlora.engine.head import chunked_loss
from nbqlora.engine.surgery import keep_linears_trainable
from tests import tiny

KEEP, RECOMPUTE = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE
# What transformers' own layers can have.
STOCK = (KEEP, RECOMPUTE, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.OFFLOAD)
BATCHES = {"padded": tiny.padded_batch(), "packed": tiny.packed_batch()}


def fp32(folder: Path) -> Any:
    return tiny.with_lora(tiny.make_model(), lora_dropout=0.1)


def nf4(folder: Path) -> Any:
    model = tiny.load_nf4(tiny.save_model(folder))
    keep_linears_trainable(model)
    return tiny.with_lora(model)


def loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.train()
    model.zero_grad()
    torch.manual_seed(1)
    total, count = chunked_loss(HeadSpec(tied=False), 16)(model, batch)
    (total / count).backward()
    gradients = {name: p.grad.clone() for name, p in tiny.lora_parameters(model).items()}
    return total.detach(), gradients


@pytest.mark.parametrize("make", [fp32, nf4])
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_every_mix_is_equal_to_the_bit(make: Callable[[Path], Any], batch: dict[str, Any], tmp_path: Path) -> None:
    model = make(tmp_path)
    expected_loss, expected = loss_and_gradients(model, batch)
    assert all(g.any() for g in expected.values())
    for mix in itertools.product(STOCK, repeat=tiny.LAYERS):
        apply_policies(model, mix, slot_bytes=1 << 20)
        loss, gradients = loss_and_gradients(model, batch)
        assert torch.equal(loss, expected_loss), mix
        assert all(torch.equal(gradients[name], g) for name, g in expected.items()), mix


def test_the_layers_named_are_those_that_are_recomputed() -> None:
    model = tiny.with_lora(tiny.make_model()).train()
    made = apply_policies(model, [RECOMPUTE, KEEP, RECOMPUTE])
    paths = [name for name, _ in decoder_layers(model)]
    assert [(r.path, r.old, r.new) for r in made] == [(paths[i], "keep", "recompute") for i in (0, 2)]
    calls = dict.fromkeys(paths, 0)
    for name, layer in decoder_layers(model):

        def count(*_: Any, name: str = name) -> None:
            calls[name] += 1

        layer.self_attn.register_forward_hook(count)
    loss_and_gradients(model, tiny.padded_batch())
    assert list(calls.values()) == [2, 1, 2]


def test_a_second_plan_replaces_the_first() -> None:
    model = tiny.make_model()
    apply_policies(model, [RECOMPUTE] * 3)
    apply_policies(model, [KEEP, KEEP, RECOMPUTE])
    assert [layer.gradient_checkpointing for _, layer in decoder_layers(model)] == [False, False, True]


def test_clear_policies_leaves_nothing_behind() -> None:
    model = tiny.make_model()
    before = [set(vars(layer)) for _, layer in decoder_layers(model)]
    apply_policies(model, [RECOMPUTE, KEEP, RECOMPUTE])
    clear_policies(model)
    assert [set(vars(layer)) for _, layer in decoder_layers(model)] == before
    assert not any(layer.gradient_checkpointing for _, layer in decoder_layers(model))


@pytest.mark.parametrize("n", [0, 2, 4])
def test_a_wrong_number_of_policies_changes_nothing(n: int) -> None:
    model = tiny.make_model()
    with pytest.raises(ValueError, match=rf"^the plan holds {n} layer policies; the model has 3 layers$"):
        apply_policies(model, [RECOMPUTE] * n)
    assert not any(layer.gradient_checkpointing for _, layer in decoder_layers(model))
