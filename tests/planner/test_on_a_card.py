"""A fused layer on a card: what it keeps, and its backward's peak, by the kernel that computes attention."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.families import FAMILIES
from nbqlora.core.specs import BatchLayout, LayerPolicy
from nbqlora.engine.attention import AttentionKind, Documents
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Call
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward
from nbqlora.planner.attention import Kernel
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import fused_layer
from nbqlora.planner.walk import backward_peak
from tests.planner.live_bytes import storage_bytes
from tests.planner.shapes import DEVICES, options
from tests.tiny import save_model

pytestmark = pytest.mark.gpu
ROWS, SEQ = 2, 2048
# The second is narrow, so that attention decides its peak.
SHAPES: dict[str, dict[str, Any]] = {
    "a wide MLP": {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2},
    "a narrow MLP": {"hidden_size": 1024, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2},
}


def end_to_end(lengths: tuple[int, ...]) -> Documents:
    boundaries = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).cuda()
    return Documents(rows=1, seq=sum(lengths), cu_seqlens=boundaries, max_tokens=SEQ, lengths=lengths)


LAYOUTS = {
    BatchLayout.PADDED: lambda: Documents(rows=ROWS, seq=SEQ, cu_seqlens=None, max_tokens=SEQ, lengths=None),
    BatchLayout.JOINED: lambda: end_to_end((SEQ, 800, 700, 200, 100, 100, 100, 48)),
}
CASES = [
    (Kernel.FLASH, BatchLayout.PADDED), (Kernel.FLASH, BatchLayout.JOINED), (Kernel.CUDNN, BatchLayout.PADDED),
    (Kernel.EFFICIENT, BatchLayout.PADDED), (Kernel.EFFICIENT, BatchLayout.JOINED),
]  # fmt: skip


def asked_for(when: str) -> int:
    """Bytes of all tensors; what is allocated also counts the ends of blocks that were not split, up to 1 MiB each."""
    found: int = torch.cuda.memory_stats()[f"requested_bytes.all.{when}"]
    return found


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kernel,layout", CASES, ids=lambda x: x.value)
def test_a_layer(kernel: Kernel, layout: BatchLayout, shape: dict[str, int], tmp_path: Path) -> None:
    loaded = nbqlora.load(
        str(save_model(tmp_path / "model", **shape)), dtype="fp16", max_length=SEQ, lora_r=16,
        per_device_train_batch_size=ROWS,
    )  # fmt: skip
    engine = engine_of(loaded.model)
    assert engine is not None and engine.complete
    layer = list(engine.layers.values())[1]
    x = torch.randn(ROWS * SEQ, layer.o.n_out, device="cuda", dtype=torch.float16)
    angles = torch.randn(ROWS * SEQ, layer.heads.dim, device="cuda", dtype=torch.float16)
    kind = AttentionKind[kernel.name]
    call = Call(documents=LAYOUTS[layout](), cos=angles.cos(), sin=angles.sin(), attention=kind)
    batch = MicroBatch(rows=ROWS, row_tokens=SEQ, supervised_tokens=1, layout=layout, n_documents=7)
    planned = fused_layer(FAMILIES["llama"], loaded.spec, options(), DEVICES["H100"], "fp16", batch)
    planned = replace(planned, attended=replace(planned.attended, kernel=kernel))
    assert planned.attended.documents == (ROWS if layout is BatchLayout.PADDED else 8)
    engine.scratch.needed_adapters().begin_gradients()
    for policy, tile in itertools.product(LayerPolicy, (0, 512)):
        layer.policy, layer.scratch.mlp_tile_tokens = policy, tile
        for measured in (False, True):  # first, so that workspaces and the arena are there
            with torch.no_grad():
                kept = layer_forward(layer, x, call)[1]
                gradient = torch.randn(x.shape, device="cuda", dtype=torch.float16)
                layer.scratch.handed = None
                torch.cuda.reset_peak_memory_stats()
                before = asked_for("current")
                layer_backward(layer, gradient, dict(kept), call, need_input=True)
                found = asked_for("peak") - before + gradient.nbytes
            if measured:
                # Beside the log-sum-exp an operator returns the state of random numbers.
                sizes = storage_bytes(t for name, t in kept.items() if name not in ("attention_1", "attention_2"))
                assert sizes == planned.kept_bytes(policy), policy
                expected = backward_peak(planned, policy, last=True, tile_tokens=tile)
                assert 0.99 * found <= expected <= 1.05 * found, (policy, tile, expected / found)
