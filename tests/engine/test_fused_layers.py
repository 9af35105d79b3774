"""Fused layers in every form that they must hold: NF4, biases, dropout, fewer targets, policies, modes of a model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.checkpoint import apply_policies
from nbqlora.engine.fused import engine_of
from nbqlora.engine.optimize import NEW, optimize, restore
from tests.engine.test_fused_families import BATCHES, assert_same, family_model, loss_and_gradients
from tests.tiny import load_nf4, make_model, padded_batch, save_model, with_lora

KEEP, MLP, ALL = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN
SLOT_BYTES = 1 << 20


def fused(model: Any) -> tuple[Replacement, ...]:
    made = optimize(model)
    assert made[0].new == NEW, made
    return made


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "olmo2"])
def test_every_mix_of_policies_gives_the_same_bits(family: str) -> None:
    model = family_model(family)
    fused(model)
    batch = BATCHES["packed"]
    loss, gradients = loss_and_gradients(model, batch)
    mixes = [mix for mix in itertools.product(LayerPolicy, repeat=3) if joins(mix)]
    assert len(mixes) == 82
    for mix in mixes:
        apply_policies(model, mix, slot_bytes=SLOT_BYTES)
        found = loss_and_gradients(model, batch)
        assert torch.equal(found[0], loss), mix
        assert all(torch.equal(found[1][n], gradients[n]) for n in gradients), mix


def joins(mix: tuple[LayerPolicy, ...]) -> bool:
    """Whether each layer that joins has one before it that it can join."""
    pairs = zip((KEEP, *mix), mix, strict=False)
    return all(before in (ALL, OFFLOAD, JOIN) for before, policy in pairs if policy is JOIN)


@pytest.mark.parametrize(
    "mix", [(OFFLOAD, JOIN, JOIN), (ALL, JOIN, MLP), (OFFLOAD, OFFLOAD, OFFLOAD), (MLP, MLP, KEEP)]
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "olmo2", "granite"])
@pytest.mark.parametrize("quantized", [True, False])
def test_tiles_of_an_mlp(quantized: bool, family: str, mix: tuple[LayerPolicy, ...], tmp_path: Path) -> None:
    if quantized:
        model = with_lora(load_nf4(save_model(tmp_path / family, family))).train()
    else:
        model = family_model(family)
    fused(model)
    batch = BATCHES["padded"]
    expected = loss_and_gradients(model, batch)
    for size in (1, 7, 16, 10_000):
        apply_policies(model, mix, slot_bytes=SLOT_BYTES, mlp_tile_tokens=size)
        assert_same(loss_and_gradients(model, batch), expected)


def test_with_dropout_an_mlp_is_whole_and_a_joined_layer_draws_its_mask_once() -> None:
    model = family_model("llama", lora_dropout=0.3)
    fused(model)
    torch.manual_seed(3)
    loss, gradients = loss_and_gradients(model, BATCHES["packed"])
    apply_policies(model, (OFFLOAD, JOIN, JOIN), slot_bytes=SLOT_BYTES, mlp_tile_tokens=4)
    torch.manual_seed(3)
    found = loss_and_gradients(model, BATCHES["packed"])
    assert torch.equal(found[0], loss)
    assert all(torch.equal(found[1][n], gradients[n]) for n in gradients)


def test_policies_that_a_model_cannot_have() -> None:
    model = family_model("llama")
    fused(model)
    with pytest.raises(ValueError, match="joins the layer before it, which has to recompute, offload or join"):
        apply_policies(model, (KEEP, JOIN, KEEP))
    with pytest.raises(ValueError, match="joins the layer before it"):
        apply_policies(model, (JOIN, KEEP, KEEP))
    with pytest.raises(ValueError, match="1 layers offload their input, and slot_bytes does not say"):
        apply_policies(model, (OFFLOAD, KEEP, KEEP))
    apply_policies(model, (OFFLOAD, KEEP, KEEP), slot_bytes=64)
    with pytest.raises(ValueError, match="a slot was made for 64"):
        loss_and_gradients(model, BATCHES["packed"])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_nf4_as_bitsandbytes_multiplies(family: str, double: bool, tmp_path: Path) -> None:
    folder = save_model(tmp_path / family, family)
    model = with_lora(load_nf4(folder, double=double)).train()
    expected = loss_and_gradients(model, BATCHES["padded"])
    fused(model)
    assert_same(loss_and_gradients(model, BATCHES["padded"]), expected)


@pytest.mark.parametrize(
    "targets", [["q_proj"], ["v_proj", "down_proj"], ["gate_proj"], ["k_proj", "o_proj", "up_proj"], ["up_proj"]]
)
@pytest.mark.parametrize("quantized", [True, False])
def test_any_subset_of_targets(targets: list[str], quantized: bool, tmp_path: Path) -> None:
    base = load_nf4(save_model(tmp_path / "llama")) if quantized else make_model()
    model = with_lora(base, target_modules=targets).train()
    expected = loss_and_gradients(model, BATCHES["packed"])
    fused(model)
    assert_same(loss_and_gradients(model, BATCHES["packed"]), expected)


def test_scale_that_is_not_a_power_of_two() -> None:
    model = with_lora(make_model(), lora_alpha=7).train()
    expected = loss_and_gradients(model, BATCHES["packed"])
    fused(model)
    assert_same(loss_and_gradients(model, BATCHES["packed"]), expected)


def test_gradients_accumulate_and_zero_grad_begins_anew() -> None:
    model = family_model("llama")
    fused(model)
    once = loss_and_gradients(model, BATCHES["packed"])[1]
    model(**BATCHES["packed"], use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, 2 * once[name], rtol=1e-4, atol=1e-6), name
    model.zero_grad(set_to_none=False)
    model(**BATCHES["packed"], use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.allclose(parameter.grad, once[name], rtol=1e-4, atol=1e-6), name


def test_zero_grad_between_forward_and_backward() -> None:
    model = family_model("llama")
    fused(model)
    expected = loss_and_gradients(model, BATCHES["packed"])[1]
    loss = model(**BATCHES["packed"], use_cache=False).loss
    model.zero_grad(set_to_none=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name


def test_backward_twice_through_one_graph() -> None:
    model = family_model("llama")
    fused(model)
    expected = loss_and_gradients(model, BATCHES["packed"])[1]
    model.zero_grad(set_to_none=True)
    loss = model(**BATCHES["packed"], use_cache=False).loss
    loss.backward(retain_graph=True)
    model.zero_grad(set_to_none=True)
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name]), name


def test_parameters_that_lost_their_views_are_put_back() -> None:
    model = family_model("llama")
    fused(model)
    expected = loss_and_gradients(model, BATCHES["packed"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    assert_same(loss_and_gradients(model, BATCHES["packed"]), expected, tolerance=1e-7)
    adapters = engine_of(model).scratch.adapters
    assert all(p.data_ptr() == adapters.view(adapters.master, p).data_ptr() for p in adapters.parameters)


def test_adapters_off_merged_and_evaluation_are_the_stock_model() -> None:
    model = family_model("llama").eval()
    batch = {"input_ids": padded_batch(rows=2)["input_ids"]}
    with torch.no_grad():
        on = model(**batch).logits
        with model.disable_adapter():
            off = model(**batch).logits
    fused(model)
    with torch.no_grad():
        assert torch.allclose(model(**batch, use_cache=False).logits, on, atol=1e-5)
        with model.disable_adapter():
            assert torch.equal(model(**batch).logits, off)
        model.merge_adapter()
        assert torch.allclose(model(**batch).logits, on, atol=1e-4)
        model.unmerge_adapter()
    assert not torch.allclose(on, off, atol=1e-3)


def test_left_padding_goes_through_transformers_own_forward() -> None:
    model = family_model("llama")
    batch = padded_batch(rows=2)
    flipped = {k: v.flip(1) for k, v in batch.items()}
    expected = loss_and_gradients(model, flipped)
    fused(model)
    assert_same(loss_and_gradients(model, flipped), expected, tolerance=1e-6)


def test_generate_is_transformers_own() -> None:
    model = family_model("llama").eval()
    ids = torch.randint(0, 256, (2, 9))
    expected = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=True)
    fused(model)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, use_cache=True), expected)


def test_saved_and_loaded_adapters_are_pefts(tmp_path: Path) -> None:
    from peft import PeftModel

    model = family_model("llama")
    expected = loss_and_gradients(model, BATCHES["packed"])
    fused(model)
    names = [n for n, _ in model.named_parameters()]
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(make_model(), str(tmp_path / "adapter"), is_trainable=True).train()
    assert [n for n, _ in again.named_parameters()] == names
    assert_same(loss_and_gradients(again, BATCHES["packed"]), expected, tolerance=1e-6)


def test_restore_puts_back_every_attribute() -> None:
    model = family_model("qwen3")
    modules = dict(model.named_modules())
    before = {n: (dict(m.__dict__), dict(m._forward_hooks), dict(m._forward_pre_hooks)) for n, m in modules.items()}
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    fused(model)
    loss_and_gradients(model, BATCHES["packed"])
    restore(model)
    for name, module in modules.items():
        attributes, hooks, pre_hooks = before[name]
        assert module.__dict__.keys() == attributes.keys(), name
        assert all(module.__dict__[k] is v for k, v in attributes.items() if k not in ("training",)), name
        assert (dict(module._forward_hooks), dict(module._forward_pre_hooks)) == (hooks, pre_hooks), name
    assert all(torch.equal(p, values[n]) for n, p in model.named_parameters())
    pointers = [p.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"lora_bias": True}, "LoRA with a bias"),
        ({"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 3}}, "differ in scale"),
        ({"modules_to_save": ["input_layernorm"]}, "norm"),
    ],
)
def test_what_does_not_match_is_left_and_said(changes: dict[str, Any], reason: str) -> None:
    model = with_lora(make_model(), **changes).train()
    batch = BATCHES["padded"]
    expected = loss_and_gradients(model, batch)
    made = optimize(model)
    assert [r.new for r in made] == [""] and reason in made[0].because, made
    assert_same(loss_and_gradients(model, batch), expected, tolerance=1e-6)


def test_one_layer_that_does_not_match_leaves_the_others_fused() -> None:
    model = family_model("llama")
    expected = loss_and_gradients(model, BATCHES["padded"])
    model.get_base_model().model.layers[1].mlp.act_fn = torch.nn.ReLU()
    model.get_base_model().model.layers[1].mlp.gate_proj.lora_A["default"].bias = torch.nn.Parameter(torch.zeros(4))
    changed = loss_and_gradients(model, BATCHES["padded"])
    assert not torch.isclose(changed[0], expected[0])
    made = optimize(model)
    assert [bool(r.new) for r in made] == [True, False] and "layers.1" in made[1].path
    assert_same(loss_and_gradients(model, BATCHES["padded"]), changed)


def test_a_layer_that_computes_something_else_is_found_by_the_probe() -> None:
    model = family_model("llama")
    for layer in model.get_base_model().model.layers:
        layer.mlp.act_fn = torch.nn.ReLU()
    (left,) = optimize(model)
    assert not left.new and "differs from transformers' own" in left.because
    assert engine_of(model) is None


class TestDropout:
    def test_its_mask_is_the_same_when_a_layer_is_recomputed(self) -> None:
        model = family_model("llama", lora_dropout=0.3)
        made = fused(model)
        assert any("one dropout mask" in r.because for r in made)
        found = []
        for policy in (KEEP, MLP, ALL):
            apply_policies(model, [policy] * 3)
            torch.manual_seed(5)
            found.append(loss_and_gradients(model, BATCHES["packed"]))
        for other in found[1:]:
            assert torch.equal(other[0], found[0][0])
            assert all(torch.equal(other[1][n], g) for n, g in found[0][1].items())

    def test_its_gradients_are_the_derivative_of_its_loss(self) -> None:
        model = family_model("llama", lora_dropout=0.3)
        fused(model)
        torch.manual_seed(5)
        _, gradients = loss_and_gradients(model, BATCHES["packed"])
        name = next(n for n in gradients if "layers.0.self_attn.k_proj.lora_A" in n)
        parameter = dict(model.named_parameters())[name]
        step = 3e-3 * torch.randn_like(parameter)
        losses = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * step
                torch.manual_seed(5)
                losses.append(float(model(**BATCHES["packed"], use_cache=False).loss))
                parameter -= sign * step
        expected = float((gradients[name] * step).sum())
        assert losses[0] - losses[1] == pytest.approx(2 * expected, rel=2e-2, abs=2e-6)

    def test_without_training_nothing_is_dropped(self) -> None:
        model = family_model("llama", lora_dropout=0.3).eval()
        batch = {"input_ids": padded_batch(rows=2)["input_ids"]}
        with torch.no_grad():
            expected = model(**batch, use_cache=False).logits
            fused(model)
            assert torch.allclose(model(**batch, use_cache=False).logits, expected, atol=1e-5)


def test_half_precision_in_and_out_of_autocast(tmp_path: Path) -> None:
    model = with_lora(load_nf4(save_model(tmp_path / "llama"), dtype=torch.bfloat16)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = loss_and_gradients(model, BATCHES["packed"])
    fused(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss_and_gradients(model, BATCHES["packed"])
    outside = loss_and_gradients(model, BATCHES["packed"])
    for found in (inside, outside):
        assert torch.isclose(found[0].float(), expected[0].float(), rtol=2e-2)
        for name, gradient in expected[1].items():
            assert (found[1][name] - gradient).norm() < 0.1 * gradient.norm(), name
