"""A layer of zeros stands for a model's own: the same parts, widths and dtypes, and nothing left behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.families import FAMILIES
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.attention import AttentionKind
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Layer, Norm
from nbqlora.engine.layer_shape import LayerShape, shape_of
from nbqlora.engine.optimize import optimize
from nbqlora.engine.rehearsal import Rehearsal
from nbqlora.kernels.nf4 import Nf4
from tests import tiny

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300, "hidden_act": "silu",
}  # fmt: skip


def of(config: Mapping[str, Any] = LLAMA, **changes: Any) -> Rehearsal:
    shape = shape_of(config)
    assert shape is not None
    made = Rehearsal(shape=shape, device=torch.device("cpu"), dtype=torch.float32, in_4bit=False, lora_r=4)
    return replace(made, **changes)


def norm_facts(norm: Norm | None) -> Any:
    return norm and (norm.weight.shape, norm.weight.dtype, norm.style)


def weight_facts(weight: Nf4 | torch.Tensor) -> Any:
    if not isinstance(weight, Nf4):
        return weight.shape, weight.dtype
    tensors = (weight.packed, weight.absmax, weight.code, weight.nested_absmax, weight.nested_code, weight.offset)
    return [(t.shape, t.dtype) for t in tensors if t is not None], weight.blocksize, weight.nested_blocksize


def facts(layer: Layer) -> dict[str, Any]:
    """What decides which kernels are compiled."""
    heads, scratch = layer.heads, layer.scratch
    assert scratch.adapters is not None
    return {
        "groups": [
            (g.joined, g.reads_own, [(p.name, p.n_out, p.n_in, p.r, weight_facts(p.weight)) for p in g.projections])
            for g in layer.groups
        ],
        "heads": (heads.n, heads.n_kv, heads.dim, heads.normed, heads.softcap),
        "norms": [norm_facts(n) for n in (layer.attention_in, layer.attention_out, layer.mlp_in, layer.mlp_out)],
        "of heads": [norm_facts(n) for n in (layer.q_norm, layer.k_norm)],
        "activation": layer.activation,
        "scratch": scratch.arena.n_bytes,
        "adapters": scratch.adapters.dtype,
    }


def own(model: Any) -> Layer:
    """A model's own first layer; its windows and kinds of layers are nothing that a kernel is compiled for."""
    optimize(model)
    engine = engine_of(model)
    assert engine is not None and engine.complete
    layer = next(iter(engine.layers.values()))
    assert layer.policy is LayerPolicy.KEEP
    return layer


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name in FAMILIES])
def test_a_layer_is_a_models_own(family: str) -> None:
    model = tiny.with_lora(tiny.make_model(family))
    assert facts(of(model.config.to_dict()).layer()) == facts(own(model))


def test_some_linears_only() -> None:
    model = tiny.with_lora(tiny.make_model(), target_modules=["q_proj", "down_proj"])
    mine = of(model.config.to_dict(), adapted=("q_proj", "down_proj")).layer()
    assert facts(mine) == facts(own(model))


def test_in_4_bits(nf4_model: Any) -> None:
    mine = of(nf4_model.config.to_dict(), in_4bit=True).layer()
    assert facts(mine) == facts(own(nf4_model))


@pytest.fixture
def nf4_model(tmp_path: Path) -> Any:
    # Wide enough that a second quantization has more than one entry.
    return tiny.with_lora(tiny.load_nf4(tiny.save_model(tmp_path, hidden_size=256, intermediate_size=512)))


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@pytest.mark.parametrize("in_4bit", [True, False])
def test_it_runs_and_draws_no_numbers(family: str, in_4bit: bool) -> None:
    config = tiny.make_model(family).config.to_dict()
    torch.manual_seed(3)
    before = torch.get_rng_state()
    of(config, in_4bit=in_4bit).attend()
    of(config, in_4bit=in_4bit).run()
    assert torch.equal(torch.get_rng_state(), before)


def test_capped_scores_are_written_out() -> None:
    config = {**LLAMA, "model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "attn_logit_softcapping": 50.0}
    assert [kind for kind, _ in of(config).attention_calls()] == [AttentionKind.MATH] * 2
    assert of().attention_calls() == [(AttentionKind.SDPA, (16,)), (AttentionKind.SDPA, (8, 8))]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {**LLAMA, "model_type": "mamba"},
        {**LLAMA, "hidden_act": "relu"},
        {**LLAMA, "hidden_size": None},
        {k: v for k, v in LLAMA.items() if k != "intermediate_size"},
    ],
)
def test_what_has_no_fused_layers(config: Mapping[str, Any]) -> None:
    assert shape_of(config) is None


def test_a_text_model_within_another() -> None:
    inner = {**LLAMA, "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 256}
    shape = shape_of({"model_type": "gemma3", "vision_config": {"hidden_size": 1152}, "text_config": inner})
    assert isinstance(shape, LayerShape)
    assert (shape.architecture, shape.head_dim, shape.n_kv_heads) == ("gemma3_text", 256, 2)
