"""Layers of real models on torch's meta device: the plan's bytes against the tensors of the real functions, no memory.

transformers' own classes with the published shapes, PEFT's adapters and NF4 weights, all without storage; the engine
reads its layer off them and runs forward and backward. Attention is flash, whose operator is a card's: what it uses
inside is not seen here (``test_on_a_card``), and nothing is planned for it. Elementwise work is the reference's, as on
a CPU, and is planned so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from nbqlora.core.families import FAMILIES
from nbqlora.core.specs import BatchLayout, LayerPolicy, ModelSpec
from nbqlora.engine.attention import AttentionKind, Documents
from nbqlora.engine.group import Scratch
from nbqlora.engine.layer import Call, Layer
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward
from nbqlora.engine.match import read_layer
from nbqlora.engine.optimize import flat_adapters, scratch_bytes
from nbqlora.kernels.nf4 import Nf4
from nbqlora.memory.arena import DequantArena
from nbqlora.planner.attention import Attended, Kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import FusedLayer, fused_layer
from nbqlora.planner.known import SHAPES, model_of
from nbqlora.planner.walk import backward_peak, forward_peak
from tests.planner.live_bytes import live_peak
from tests.planner.shapes import cpu, options

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
ROWS, SEQ, RANK = 2, 2048, 16
LAYOUTS: dict[BatchLayout, Callable[[], Documents]] = {
    BatchLayout.PADDED: lambda: Documents(rows=ROWS, seq=SEQ, cu_seqlens=None, max_tokens=SEQ, lengths=None),
    BatchLayout.PACKED: lambda: Documents(
        rows=1, seq=ROWS * SEQ, cu_seqlens=torch.empty(8, dtype=torch.int32, device="meta"), max_tokens=SEQ,
        lengths=None,
    ),
}  # fmt: skip


class OutsideTheOperator(Attended):
    """Attention whose operator takes nothing."""

    forward_bytes = backward_bytes = 0


@dataclass
class DryLayer:
    """A layer without memory, and the planner's of the same model."""

    real: Layer
    planned: FusedLayer
    call: Call
    x: torch.Tensor


def nf4(n_rows: int, n_cols: int) -> Nf4:
    def empty(n: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(n, dtype=dtype, device="meta")

    blocks = n_rows * n_cols // 64
    return Nf4(
        packed=empty(n_rows * n_cols // 2, torch.uint8), absmax=empty(blocks, torch.uint8),
        code=empty(16, torch.float32), n_rows=n_rows, n_cols=n_cols,
        nested_absmax=empty(-(-blocks // 256), torch.float32), nested_code=empty(256, torch.float32),
        offset=torch.empty((), dtype=torch.float32, device="meta"),
    )  # fmt: skip


def model_without_memory(spec: ModelSpec, dtype: torch.dtype) -> Any:
    import transformers
    from peft import LoraConfig, inject_adapter_in_model

    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=spec.d_model, intermediate_size=spec.d_ff, num_hidden_layers=1,
        num_attention_heads=spec.n_heads, num_key_value_heads=spec.n_kv_heads,
    )  # fmt: skip
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).to(dtype).requires_grad_(False)
        model = inject_adapter_in_model(LoraConfig(r=RANK, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
    return model.train()


def dry_layer(shape: str, dtype: str, layout: BatchLayout) -> DryLayer:
    spec, kind = model_of(shape), DTYPES[dtype]
    model, scratch = model_without_memory(spec, kind), Scratch(DequantArena(torch.device("meta"), 0))
    layer = read_layer(model.model.layers[0], model.config, scratch)
    for group in layer.groups:
        group.quantized = True
        for projection in group.projections:
            projection.weight = nf4(projection.n_out, projection.n_in)
    scratch.arena.n_bytes = scratch_bytes(layer, kind)
    scratch.arena.take(1, 1, torch.uint8)  # it stays
    scratch.adapters = flat_adapters({"layer": layer}, kind)
    scratch.needed_adapters().all_gradients()
    documents = LAYOUTS[layout]()
    angles = torch.empty(documents.tokens, spec.head_dim, dtype=kind, device="meta")
    call = Call(documents=documents, cos=angles, sin=angles, attention=AttentionKind.FLASH)
    batch = MicroBatch(rows=ROWS, row_tokens=SEQ, supervised_tokens=1, layout=layout, n_documents=7)
    planned = fused_layer(FAMILIES["llama"], spec, options(lora_r=RANK), cpu(), dtype, batch)
    inside = {**vars(planned.attended), "kernel": Kernel.FLASH}
    x = torch.empty(documents.tokens, spec.d_model, dtype=kind, device="meta")
    return DryLayer(layer, replace(planned, attended=OutsideTheOperator(**inside)), call, x)


def check(dry: DryLayer, policy: LayerPolicy, tile: int) -> None:
    layer, x, call = dry.real, dry.x, dry.call
    layer.policy, layer.scratch.mlp_tile_tokens = policy, tile
    with torch.no_grad():
        kept = layer_forward(layer, x, call)[1]
        found = live_peak(lambda: layer_forward(layer, x, call))
    expected = forward_peak(dry.planned, policy, tile)
    assert 0.99 * found <= expected <= 1.03 * found, (policy, tile, expected / found)
    # Flash also returns the state of random numbers.
    sizes = storage_bytes_of(t for name, t in kept.items() if name not in ("attention_1", "attention_2"))
    assert sizes == dry.planned.kept_bytes(policy)
    for last in (True, False):
        gradient = torch.empty(x.shape[0], x.shape[1] + (0 if last else layer.down.r), dtype=x.dtype, device="meta")
        layer.scratch.handed = None if last else gradient
        body = gradient[:, : x.shape[1]]
        with torch.no_grad():
            found = live_peak(lambda: layer_backward(layer, body, dict(kept), call, need_input=True))  # noqa: B023
        expected = backward_peak(dry.planned, policy, last=last, tile_tokens=tile)
        found += gradient.nbytes
        assert 0.99 * found <= expected <= 1.03 * found, (policy, tile, last, expected / found)


def storage_bytes_of(tensors: Any) -> int:
    """Bytes of all storages, each once; without memory they have no address."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("shape,dtype,layout", [
    ("8B", "fp16", BatchLayout.PADDED), ("70B", "bf16", BatchLayout.PACKED), ("1B", "fp32", BatchLayout.PACKED),
])  # fmt: skip
def test_a_layer_of_a_real_size(shape: str, dtype: str, layout: BatchLayout) -> None:
    dry = dry_layer(shape, dtype, layout)
    for policy in (LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE):
        for tile in (0, 512):
            check(dry, policy, tile)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: x.value)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_policies_sizes_and_tiles(shape: str, dtype: str, layout: BatchLayout) -> None:
    dry = dry_layer(shape, dtype, layout)
    for policy in LayerPolicy:
        for tile in (0, 512, 1024, 2048):
            check(dry, policy, tile)
