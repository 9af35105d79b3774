"""Long rows on a card: attention's backward in groups of heads, and a layer that writes over what it does not need."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.families import FAMILIES
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine import attention_groups
from nbqlora.engine.attention import AttentionKind, Documents, attention_backward, attention_forward
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Call
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward
from nbqlora.planner import attention
from nbqlora.planner.attention import Attended, Kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import fused_layer
from nbqlora.planner.walk import backward_peak
from tests.engine.attention_truth import dense, inputs, packed
from tests.planner.shapes import DEVICES, options
from tests.tiny import save_model

pytestmark = pytest.mark.gpu
KINDS = {
    AttentionKind.FLASH: Kernel.FLASH,
    AttentionKind.CUDNN: Kernel.CUDNN,
    AttentionKind.EFFICIENT: Kernel.EFFICIENT,
}
HOW = {"scale": 128**-0.5}


@pytest.mark.parametrize("layout", ["rows", "pack"])
@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_as_good_as_all_heads_at_once(
    kind: AttentionKind, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind is AttentionKind.CUDNN and (layout == "pack" or torch.cuda.get_device_capability() < (9, 0)):
        pytest.skip("cuDNN takes rows of one length, on capability 9.0")
    documents = dense(2, 1024) if layout == "rows" else packed((1000, 24, 513, 511), padding=4, device="cuda")
    four = inputs(2048, 32, 8, 128, torch.float16, device="cuda")
    q, k, v, dout = four
    out, saved = attention_forward(kind, q, k, v, documents, **HOW)
    whole = attention_backward(kind, dout, q, k, v, out, saved, documents, **HOW)
    again = attention_backward(kind, dout, q, k, v, out, saved, documents, **HOW)
    noise = max(float((a - b).abs().max()) for a, b in zip(whole, again, strict=True))
    for limit in (1, 2**24, 2**25):
        monkeypatch.setattr(attention_groups, "WORKSPACE_BYTES", limit)
        given = inputs(2048, 32, 8, 128, torch.float16, device="cuda")[:3]
        found = attention_backward(kind, dout, *given, out, saved, documents, **HOW, over=True)
        apart = max(float((a - b).abs().max()) for a, b in zip(found, whole, strict=True))
        size = max(float(b.abs().max()) for b in whole)
        print(f"{kind.value} {layout} {limit}: differ by {apart:.2e} of {size:.2f}, twice the same by {noise:.2e}")
        assert apart <= max(4 * noise, 2e-3 * size)


@pytest.mark.parametrize("tokens", [16384, 32768])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_long_row_takes(kind: AttentionKind, tokens: int) -> None:
    if kind is AttentionKind.CUDNN and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen on capability 9.0")
    planned = Attended(
        kernel=KINDS[kind], q=4096, kv=1024, head_dim=128, tokens=tokens, documents=1, longest=tokens, dense=True,
        window=False, on_card=True, c=2,
    )  # fmt: skip
    q, k, v, dout = inputs(tokens, 32, 8, 128, torch.float16, device="cuda")
    documents = dense(1, tokens)
    out, saved = attention_forward(kind, q, k, v, documents, **HOW)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attention_backward(kind, dout, q, k, v, out, saved, documents, **HOW, over=True)
    taken = torch.cuda.max_memory_allocated() - before
    own = q.nbytes + k.nbytes + v.nbytes if planned.groups == 1 else 0
    expected = planned.backward_bytes + own
    print(f"{kind.value} {tokens}: {planned.groups} groups, {taken / 2**20:.0f} MiB, planned {expected / 2**20:.0f}")
    assert (planned.groups > 1) == (tokens > 16384)
    assert 0.99 * taken <= expected <= 1.25 * taken


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_in_groups_and_tiles(kind: AttentionKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the layers of ``tests/planner/test_on_a_card.py``, for the second of two that stand behind each other."""
    if kind is AttentionKind.CUDNN and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("cuDNN is chosen on capability 9.0")
    seq, limit = 4096, 4 * 4096 * 1024 // 2
    monkeypatch.setattr(attention_groups, "WORKSPACE_BYTES", limit)
    monkeypatch.setattr(attention, "WORKSPACE_BYTES", limit)
    shape = {"hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
    loaded = nbqlora.load(
        str(save_model(tmp_path / "model", **shape)), dtype="fp16", max_length=seq, lora_r=16,
        per_device_train_batch_size=1,
    )  # fmt: skip
    engine = engine_of(loaded.model)
    assert engine is not None
    layer = list(engine.layers.values())[1]
    x = torch.randn(seq, layer.o.n_out, device="cuda", dtype=torch.float16)
    angles = torch.randn(seq, layer.heads.dim, device="cuda", dtype=torch.float16)
    documents = Documents(rows=1, seq=seq, cu_seqlens=None, max_tokens=seq, lengths=None)
    call = Call(documents=documents, cos=angles.cos(), sin=angles.sin(), attention=kind)
    batch = MicroBatch(rows=1, row_tokens=seq, supervised_tokens=1)
    planned: Any = fused_layer(FAMILIES["llama"], loaded.spec, options(), DEVICES["H100"], "fp16", batch)
    planned = replace(planned, attended=replace(planned.attended, kernel=KINDS[kind]))
    assert planned.attended.groups == 2
    engine.scratch.needed_adapters().begin_gradients()
    layer.policy, layer.scratch.mlp_tile_tokens = LayerPolicy.RECOMPUTE, 512
    wide = torch.randn(seq, x.shape[1] + layer.down.r, device="cuda", dtype=torch.float16)
    with torch.no_grad():
        for _ in range(2):  # first, so that workspaces and the arena are there
            kept = layer_forward(layer, x, call)[1]
            layer.scratch.handed = gradient = wide.clone()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            layer_backward(layer, gradient[:, : x.shape[1]], dict(kept), call, need_input=True)
            found = torch.cuda.max_memory_allocated() - before + gradient.nbytes
    expected = backward_peak(planned, LayerPolicy.RECOMPUTE, last=False, tile_tokens=512)
    print(f"{kind.value}: {found / 2**20:.1f} MiB, planned {expected / 2**20:.1f}")
    assert 0.99 * found <= expected <= 1.1 * found
