"""Fused layers: the plan's bytes against the tensors that the engine's functions really hold, on a CPU, to the byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.families import FAMILIES
from nbqlora.core.specs import BatchLayout, LayerPolicy
from nbqlora.engine.attention import AttentionKind, Documents, attention_backward, attention_forward
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import DROPPED as DROPPED_BY_ENGINE
from nbqlora.engine.layer_forward import layer_forward
from nbqlora.hub.inspect import read_spec
from nbqlora.planner.attention import Attended, Kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import DROPPED, FusedLayer, fused_layer
from nbqlora.planner.walk import backward_peak, forward_peak
from tests import tiny
from tests.planner.live_bytes import Stand, live_peak, stand, storage_bytes
from tests.planner.shapes import cpu

pytestmark = pytest.mark.usefixtures("one_thread")

WIDE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 8, "num_key_value_heads": 2}
RANK, ROWS, SEQ = 16, 2, 128
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
PADDED = Documents(rows=ROWS, seq=SEQ, cu_seqlens=None, max_tokens=SEQ, lengths=None)


@dataclass
class Both:
    """A layer of the engine, and the planner's of the same model."""

    real: Stand
    planned: FusedLayer


def joined() -> Documents:
    boundaries = torch.tensor([0, SEQ, ROWS * SEQ], dtype=torch.int32)
    return Documents(rows=1, seq=ROWS * SEQ, cu_seqlens=boundaries, max_tokens=SEQ, lengths=(SEQ, SEQ))


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Both]:
    def made(
        family: str,
        dtype: torch.dtype = torch.float32,
        *,
        layout: BatchLayout = BatchLayout.PADDED,
        quantized: bool = True,
        dropout: float = 0.0,
        targets: Any = "all-linear",
        **changes: Any,
    ) -> Both:
        head_dim = {"head_dim": 32} if "head_dim" in tiny.FAMILIES[family] else {}
        shape = {**WIDE, **head_dim, **changes}
        folder = tiny.save_model(tmp_path_factory.mktemp(family), family, **shape)
        base = tiny.load_nf4(folder, dtype=dtype) if quantized else tiny.make_model(family, **shape).to(dtype)
        spec = read_spec(family, str(folder))
        model = tiny.with_lora(base, r=RANK, lora_dropout=dropout, target_modules=targets).train()
        if family == "gemma2":
            model.set_attn_implementation("eager")
        config = FinetuneConfig(
            model="m", data="rows", lora_r=RANK, lora_dropout=dropout, target_modules=targets, load_in_4bit=quantized
        )
        batch = MicroBatch(rows=ROWS, row_tokens=SEQ, supervised_tokens=1, layout=layout)
        planned = fused_layer(FAMILIES[family], spec, config, cpu(), DTYPES[dtype], batch)
        return Both(stand(model, PADDED if layout is BatchLayout.PADDED else joined()), planned)

    return made


def kept_of(both: Both, policy: LayerPolicy) -> dict[str, torch.Tensor]:
    both.real.layer.policy = policy
    with torch.no_grad():
        return layer_forward(both.real.layer, both.real.x, both.real.call)[1]


def check_kept(both: Both) -> None:
    """Names and bytes, the seeds of dropout aside; gate and up are one to the planner."""
    for policy in LayerPolicy:
        found = {name: t for name, t in kept_of(both, policy).items() if not name.startswith("seed")}
        planned = {name for name, size in both.planned.kept(policy).items() if size}
        assert {"gate_up" if name.startswith("gate_up") else name for name in found} == planned
        assert storage_bytes(found.values()) == both.planned.kept_bytes(policy), policy


def check_backward(both: Both, *, tile: int = 0) -> None:
    """The live peak beyond what was kept, with the gradient that comes: at most 5 % high and 1 % low."""
    layer, x = both.real.layer, both.real.x
    layer.scratch.mlp_tile_tokens = tile
    for policy in LayerPolicy:
        kept = kept_of(both, policy)
        for last in (True, False):
            gradient = torch.randn(x.shape[0], x.shape[1] + (0 if last else layer.down.r)).to(x.dtype)
            layer.scratch.handed = None if last else gradient
            body = gradient[:, : x.shape[1]]
            with torch.no_grad():
                found = live_peak(lambda: layer_backward(layer, body, dict(kept), both.real.call, need_input=True))  # noqa: B023
            found += gradient.nbytes
            expected = backward_peak(both.planned, policy, last=last, tile_tokens=tile)
            assert 0.99 * found <= expected <= 1.05 * found, (policy, last, expected / found)
    layer.scratch.mlp_tile_tokens = 0


def check_forward(both: Both, *, tile: int = 0) -> None:
    layer, x, call = both.real.layer, both.real.x, both.real.call
    layer.scratch.mlp_tile_tokens = tile
    for policy in LayerPolicy:
        layer.policy = policy
        with torch.no_grad():
            found = live_peak(lambda: layer_forward(layer, x, call))
        expected = forward_peak(both.planned, policy, tile)
        assert 0.99 * found <= expected <= 1.05 * found, (policy, expected / found)
    layer.scratch.mlp_tile_tokens = 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(make: Callable[..., Both], family: str, dtype: torch.dtype) -> None:
    both = make(family, dtype)
    check_kept(both)
    check_backward(both)
    check_forward(both)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_tiles(make: Callable[..., Both], family: str, dtype: torch.dtype) -> None:
    both = make(family, dtype)
    for tile in (128, 32) if dtype == torch.bfloat16 else (64,):
        check_backward(both, tile=tile)
        check_forward(both, tile=tile)


FORMS: dict[str, dict[str, Any]] = {
    "documents end to end": {"layout": BatchLayout.JOINED},
    "not quantized": {"quantized": False},
    "dropout": {"dropout": 0.1},
    "as many keys as queries": {"num_key_value_heads": 8},
    "a narrow MLP": {"intermediate_size": 256},
    "adapters on some": {"targets": ("o_proj", "down_proj")},
    "adapters on others": {"targets": ("q_proj", "up_proj")},
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gemma2", "phi3"])
def test_every_form(make: Callable[..., Both], family: str, form: dict[str, Any]) -> None:
    if family == "phi3" and "q_proj" in form.get("targets", ()):
        form = {"targets": ("qkv_proj", "gate_up_proj")}
    both = make(family, **form)
    check_kept(both)
    check_backward(both)
    check_forward(both)


def test_policies_drop_what_the_engine_drops() -> None:
    assert dict(DROPPED) == dict(DROPPED_BY_ENGINE)


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
def test_the_arena_is_the_engines(make: Callable[..., Both], family: str) -> None:
    for how in ({}, {"targets": ("o_proj", "down_proj")}, {"intermediate_size": 96}):
        both = make(family, **how)
        assert both.planned.arena_bytes == both.real.layer.scratch.arena.n_bytes
    assert make(family, quantized=False).planned.arena_bytes == 0


@pytest.mark.parametrize("lengths", [None, (128, 128), (200, 56)], ids=str)
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [Kernel.SDPA, Kernel.MATH])
def test_attention_on_a_cpu(kernel: Kernel, dtype: torch.dtype, kv_heads: int, lengths: tuple[int, ...] | None) -> None:
    boundaries = None if lengths is None else torch.tensor([0, lengths[0], 256], dtype=torch.int32)
    documents = PADDED
    if lengths is not None:
        documents = Documents(rows=1, seq=256, cu_seqlens=boundaries, max_tokens=max(lengths), lengths=lengths)
    q, k, v, gradient = (torch.randn(256, n, 32).to(dtype) for n in (8, kv_heads, kv_heads, 8))
    kind, how = AttentionKind[kernel.name], {"scale": 0.1, "softcap": 30.0 if kernel is Kernel.MATH else None}
    planned = Attended(
        kernel=kernel, q=256, kv=32 * kv_heads, head_dim=32, tokens=256, documents=2, longest=documents.longest,
        dense=lengths is None, window=False, on_card=False, c=dtype.itemsize,
    )  # fmt: skip
    out, saved = attention_forward(kind, q, k, v, documents, **how)
    assert planned.saved_bytes == storage_bytes(saved) == 0
    found = live_peak(lambda: attention_forward(kind, q, k, v, documents, **how)) - out.nbytes
    gradients = q.nbytes + k.nbytes + v.nbytes
    back = live_peak(lambda: attention_backward(kind, gradient, q, k, v, out, saved, documents, **how)) - gradients
    most = 1.02 if len({*(lengths or ())}) < 2 else 1.2  # the longest document is counted twice, where there are two
    assert found <= planned.forward_bytes <= most * found
    assert back <= planned.backward_bytes <= most * back


@pytest.mark.parametrize("kernel", [Kernel.FLASH, Kernel.CUDNN, Kernel.EFFICIENT])
def test_what_attention_on_a_card_keeps(kernel: Kernel) -> None:
    how: dict[str, Any] = {"kernel": kernel, "q": 4096, "kv": 1024, "head_dim": 128, "window": False, "on_card": True}
    dense = Attended(tokens=2 * 500, documents=2, longest=500, dense=True, c=2, **how)
    packed = Attended(tokens=1000, documents=8, longest=500, dense=False, c=2, **how)
    assert packed.saved_bytes == 4 * 32 * 1000  # a log-sum-exp of each token and head
    # The memory-efficient operator rounds a row up to 32 tokens.
    assert dense.saved_bytes == 4 * 32 * (1024 if kernel is Kernel.EFFICIENT else 1000)
    assert dense.backward_bytes < packed.backward_bytes or kernel is Kernel.CUDNN
