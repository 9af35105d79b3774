"""Attention's backward in groups of heads, its gradients written over q, k and v: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.specs import LayerPolicy
from nbqlora.engine import attention_efficient, attention_fused
from nbqlora.engine.attention import AttentionKind, Documents, attention_backward, attention_forward
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward
from tests import tiny
from tests.engine import attention_fakes
from tests.engine.attention_truth import dense, inputs, packed
from tests.planner.live_bytes import Stand, stand

EFFICIENT = AttentionKind.EFFICIENT
PACK, ROWS = packed((63, 1, 17, 2, 44), padding=3), dense(3, 32)


@pytest.fixture(autouse=True)
def fake_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private operators, in plain torch."""
    for module in (attention_efficient, attention_fused):
        monkeypatch.setattr(module, "operator", attention_fakes.OPERATORS.__getitem__)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many heads of k a group has."""

    def limit(heads: int) -> None:
        for module in (attention_efficient, attention_fused):
            monkeypatch.setattr(module, "kv_heads_at_once", lambda q, k, padded_tokens: heads)

    return limit


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("hq", "hk"), [(8, 4), (4, 4), (8, 2)])
@pytest.mark.parametrize("documents", [PACK, ROWS], ids=["pack", "rows"])
@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("kind", [EFFICIENT, AttentionKind.FLASH, AttentionKind.CUDNN])
def test_groups_give_the_same_gradients(
    kind: AttentionKind, over: bool, documents: Documents, hq: int, hk: int, window: int | None, at_once: Any
) -> None:
    if kind is AttentionKind.CUDNN and (window or documents is PACK):
        return  # it takes neither
    q, k, v, dout = inputs(documents.tokens, hq, hk, 8, torch.float64)
    how: dict[str, Any] = {"scale": 0.3, "window": window}
    out, saved = attention_forward(kind, q, k, v, documents, **how)
    whole = attention_backward(kind, dout, q, k, v, out, saved, documents, **how, over=over)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(whole, (q, k, v), strict=True)), "there is room at once"
    for heads in (3, 2, 1):
        at_once(heads)
        given = inputs(documents.tokens, hq, hk, 8, torch.float64)[:3]
        found = attention_backward(kind, dout, *given, out, saved, documents, **how, over=over)
        for name, a, b, x, before in zip("qkv", found, whole, given, (q, k, v), strict=True):
            assert (a - b).abs().max() < 1e-14, (name, heads)
            in_place = over and heads < hk
            assert (a.data_ptr() == x.data_ptr()) == in_place and torch.equal(x, a if in_place else before)


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Stand]:
    def made(family: str) -> Stand:
        shape = {"num_attention_heads": 8, "num_key_value_heads": 4}
        folder: Path = tiny.save_model(tmp_path_factory.mktemp(family), family, **shape)
        return stand(tiny.with_lora(tiny.load_nf4(folder)).train(), dense(2, 24))

    return made


def backward(at: Stand, *, kind: AttentionKind, policy: LayerPolicy, tile: int = 0, handed: bool = True) -> list[Any]:
    """Gradient of the input and of the adapters, with the gradient that came."""
    layer, call = at.layer, replace(at.call, attention=kind)
    layer.policy, layer.scratch.mlp_tile_tokens = policy, tile
    adapters = layer.scratch.needed_adapters()
    adapters.clear_gradients()
    adapters.begin_gradients()
    wide = torch.randn(at.x.shape[0], at.x.shape[1] + layer.down.r, generator=torch.Generator().manual_seed(3))
    gradient = wide[:, : at.x.shape[1]]
    with torch.no_grad():
        kept = layer_forward(layer, at.x, call)[1]
        before = {name: t.clone() for name, t in kept.items() if isinstance(t, torch.Tensor)}
        layer.scratch.handed = wide if handed else None
        found = layer_backward(layer, gradient if handed else gradient.contiguous(), dict(kept), call, need_input=True)
    assert all(torch.equal(kept[name], t) for name, t in before.items()), "what was kept is not written to"
    layer.scratch.mlp_tile_tokens = 0
    return [found, *(adapters.gradient_of(p).clone() for p in layer.parameters)]


@pytest.mark.parametrize("kind", [EFFICIENT, AttentionKind.CUDNN])
@pytest.mark.parametrize("policy", [LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_a_layer_in_groups(family: str, policy: LayerPolicy, kind: AttentionKind, make: Any, at_once: Any) -> None:
    at = make(family)
    plain = backward(at, kind=AttentionKind.SDPA, policy=policy)
    at_once(4)
    whole = backward(at, kind=kind, policy=policy)
    at_once(1)
    for tile in (0, 16):
        groups = backward(at, kind=kind, policy=policy, tile=tile)
        for a, b, c in zip(groups, whole, plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_tiles_write_over_the_gradient_that_a_layer_of_ours_made(family: str, make: Any) -> None:
    at = make(family)
    for policy in (LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE):
        own, others = (
            backward(at, kind=AttentionKind.SDPA, policy=policy, tile=16, handed=handed) for handed in (True, False)
        )
        assert all(map(torch.equal, own, others)), policy
