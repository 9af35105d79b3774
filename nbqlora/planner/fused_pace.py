"""How long a step on fused layers takes.

A frozen weight costs 4 operations a parameter and token, twice 1 more where it is computed again. An H100 whose
2048-cube matmul ran at 790 TFLOP/s took, captured (torch 2.11, measured / here, ms):

    8B bf16 r16 2 x 2048   all kept 254 / 255   all recomputed 334 / 331
    8B fp16 r32 2 x 512    all kept  74 / 73
    1B bf16 r16 4 x 2048   all kept  99 / 100        4 x 512   all kept 26 / 26

Of the first, matmuls are 162 ms (760 TFLOP/s), attention 20, unpacking weights 13, and what else is moved, 12 times
the width of the MLP and 40 times the model's for each token and layer, 54: small products keep it at about half of a
copy's rate. The rest is the time between kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.families import Family
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.planner.attention import Kernel, choose_kernel
from nbqlora.planner.fused import not_captured_because
from nbqlora.planner.link import link_rate
from nbqlora.planner.pace import Load, Pace, copy_rate
from nbqlora.planner.shards import sent_bytes
from nbqlora.planner.standing import DTYPE_BYTES, NF4_BYTES

# Shares of the matmul rate and of a copy's rate.
MATMUL_SHARE = 0.96
UNPACK_SHARE = 0.93
MOVE_SHARE = 0.55
# Between the kernels of a captured layer; and what the host needs where none is captured (6,500 launches of 32 layers
# take 100 ms).
CAPTURED_SECONDS_PER_LAYER = 0.00014
HOST_SECONDS_PER_LAYER = 0.0031
# Of the matmul rate. cuDNN and flash as measured on an H100 (2 x 2048 tokens, heads of 128); the others are guesses:
# there the memory-efficient kernel has 0.08, but the T4 that runs it has a thirtieth of the tensor cores' rate to use.
ATTENTION_SHARE = {
    Kernel.CUDNN: 0.48,
    Kernel.FLASH: 0.26,
    Kernel.EFFICIENT: 0.2,
    Kernel.SDPA: 0.2,
    Kernel.MATH: 0.05,
}
# Operations that a device does in the time that it copies a byte, where that was not measured: an H100 790 TFLOP/s
# and 3.0 TB/s, two CPU cores 190 GFLOP/s and 3.1 GB/s; other cards lie between 100 and 200 by their data sheets.
OPERATIONS_PER_BYTE = {"hopper": 263, "card": 150, "cpu": 60}


def fused_pace(
    family: Family,
    model: ModelSpec,
    device: DeviceSpec,
    dtype: str,
    load: Load,
    *,
    quantized: bool,
    dense: bool,
    shards: int = 1,
) -> Pace:
    """On fused layers. Recomputing stops before the down projection; of an MLP alone it is gate and up.

    A further tile unpacks gate, up and down in the forward; gate and up twice and down in the backward.
    """
    kernel = choose_kernel(family, device, dtype, model.head_dim, dense=dense)[0]
    layer = _Layer(model, device, DTYPE_BYTES[dtype], load, kernel, quantized)
    (d, f), whole = (model.d_model, model.d_ff), model.n_linear_params / model.n_layers
    gap, host = _launching_seconds(family, model, device, dtype, load, shards)
    kept = layer.seconds(products=2 * whole, attention=7, moved=40 * d + 12 * f) + gap
    again = layer.seconds(products=whole - d * f, attention=2, moved=14 * d) + gap / 4
    mlp = layer.seconds(products=2 * d * f, attention=0, moved=3 * d) + gap / 8
    once = layer.seconds(products=whole, attention=2, moved=17 * d + 3 * f) + gap / 3
    n, tokens = load.accumulation, load.tokens
    copied = tokens * d * DTYPE_BYTES[dtype] / copy_rate(device)
    looked_up = copied if model.embedding_on_host else 0.0
    return Pace(
        kept=n * (model.n_layers * kept + layer.head_seconds() + looked_up),
        layer=n * kept,
        recomputed=n * again,
        recomputed_mlp=n * mlp,
        forward=n * once,
        tile=n * (layer.unpack_seconds(8 * d * f) + gap / 8),
        copy=n * copied,
        tokens=tokens,
        accumulation=n,
        host=(host * model.n_layers, host / 3),
        measured=device.matmul_flops is not None,
        gather=n * sent_bytes(model, shards) / link_rate(device)[0],
    )


def _launching_seconds(
    family: Family, model: ModelSpec, device: DeviceSpec, dtype: str, load: Load, shards: int
) -> tuple[float, float]:
    """Of one layer: what lies between its captured kernels, and what the host needs to launch those that are not."""
    if not not_captured_because(family, model, device, dtype, shards=shards):
        return CAPTURED_SECONDS_PER_LAYER, 0.0
    return 0.0, 0.0 if device.kind == "cpu" else HOST_SECONDS_PER_LAYER * load.accumulation


@dataclass(frozen=True)
class _Layer:
    model: ModelSpec
    device: DeviceSpec
    c: int
    load: Load
    kernel: Kernel
    quantized: bool

    def seconds(self, *, products: float, attention: int, moved: int) -> float:
        """Of one layer.

        Args:
            products: parameters of the weights that tokens are multiplied with.
            attention: operations for each column of q, token and token that it attends to; half of these are masked.
            moved: elements a token that are read or written beside matmuls and attention.
        """
        tokens, width = self.load.tokens, self.model.n_heads * self.model.head_dim
        found = 2 * tokens * products / (self._flops * MATMUL_SHARE)
        scores = attention * tokens * self.load.attended * width
        found += scores / (self._flops * ATTENTION_SHARE[self.kernel])
        moving = tokens * self.c * moved / (self._bytes * MOVE_SHARE)
        return found + self.unpack_seconds(products) + moving

    def unpack_seconds(self, n_params: float) -> float:
        """Of unpacking so many weights."""
        return n_params * (NF4_BYTES + self.c) / (self._bytes * UNPACK_SHARE) if self.quantized else 0.0

    def head_seconds(self) -> float:
        """Of the head and the loss: two products, and logits that are read twice and written once."""
        logits = self.load.tokens * self.load.supervised_share * self.model.vocab_size
        product = 4 * logits * self.model.d_model / (self._flops * MATMUL_SHARE)
        return product + 3 * self.c * logits / (self._bytes * MOVE_SHARE)

    @property
    def _flops(self) -> float:
        return self.device.matmul_flops or 1e12

    @property
    def _bytes(self) -> float:
        """A copy's rate."""
        if self.device.copy_bytes_per_second:
            return self.device.copy_bytes_per_second
        on_card = "hopper" if (self.device.capability or (0, 0)) >= (9, 0) else "card"
        return self._flops / OPERATIONS_PER_BYTE["cpu" if self.device.kind == "cpu" else on_card]
