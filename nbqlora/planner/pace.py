"""How long a step takes, as a sum of what it computes and what it moves.

Fused layers. A frozen weight costs 4 operations a parameter and token, twice 1 more where it is computed again. An
H100 whose 2048-cube matmul ran at 790 TFLOP/s took, captured (torch 2.11, measured / here, ms):

    8B bf16 r16 2 x 2048   all kept 254 / 255   all recomputed 334 / 331
    8B fp16 r32 2 x 512    all kept  74 / 73
    1B bf16 r16 4 x 2048   all kept  99 / 100        4 x 512   all kept 26 / 26

Of the first, matmuls are 162 ms (760 TFLOP/s), attention 20, unpacking weights 13, and what else is moved, 12 times
the width of the MLP and 40 times the model's for each token and layer, 54: small products keep it at about half of a
copy's rate. The rest is the time between kernels.

What leaves the card is copied while other work runs: it costs time where it takes longer than that, and the first input
that comes back is waited for. Measured rates of such copies are the machine's own and not known to a plan: 12 GB/s
are taken where the card's generation has PCIe 3, 25 elsewhere.

Stock layers: 8B 2 x 2048 took 435 ms where its matmuls need 156, and a step never fell below 7 ms a layer, the time
the host needs to launch it (1B 4 x 512: 151 ms, 16 layers; 8B 2 x 512: 214 ms, 32 layers). transformers 5.17,
peft 0.21, bitsandbytes 0.50.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbqlora.core.families import Family
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.planner.attention import Kernel, choose_kernel
from nbqlora.planner.fused import not_captured_because
from nbqlora.planner.layer import mlp_params
from nbqlora.planner.mix import Mix
from nbqlora.planner.standing import DTYPE_BYTES, NF4_BYTES

# Stock layers: share of the matmul rate, and what the host needs.
STOCK_SHARE = 0.36
STOCK_SECONDS_PER_LAYER = 0.007
# Fused layers: shares of the matmul rate and of a copy's rate.
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
# Bytes a second over PCIe, one way: before capability 8.0 (3.0 x16 gives about 12 GB/s of 15.75), and from it on.
PCIE_BYTES = {False: 12e9, True: 25e9}
# What starting and awaiting the two copies of one input costs, and what one counts for where no rate was measured.
COPY_SECONDS = 40e-6
SLIGHTLY = 1e-3


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of one optimizer step: all layers kept, and what is added by each layer that is computed again.

    Args:
        layer: forward and backward of a layer that keeps everything.
        forward: of one layer's forward, which each layer that joins runs once more.
        tile: of a further tile of one layer's MLP: its weights are unpacked again.
        copy: of one layer's input to the host, or back.
        tokens: of a micro-batch.
        accumulation: micro-batches in a step; every figure is of all of them.
        measured: the device's rate is known; otherwise these are only good for comparing.
        host: seconds below which the host does not come: of all layers, and of each that is computed again.
    """

    kept: float
    layer: float
    recomputed: float
    recomputed_mlp: float
    forward: float
    tile: float
    copy: float
    tokens: float
    accumulation: int
    host: tuple[float, float]
    measured: bool

    def seconds(self, mix: Mix) -> float:
        """Of a step."""
        again = mix.n_whole + mix.recompute_mlp + mix.join + self._more_tiles(mix)
        return max(self.kept + self._computed(mix), self.host[0] + again * self.host[1]) + self._waited(mix)

    def twice(self, mix: Mix) -> float:
        """Layers that are computed twice; what is less or more than a layer counts as its share."""
        return self._computed(mix) / self.recomputed + SLIGHTLY * mix.offload

    def _computed(self, mix: Mix) -> float:
        """Beyond what is computed once."""
        again = mix.n_whole * self.recomputed + mix.recompute_mlp * self.recomputed_mlp
        return again + mix.join * self.forward + self._more_tiles(mix) * self.tile

    def _more_tiles(self, mix: Mix) -> int:
        """Tiles of all layers beyond the first of each."""
        if not mix.tile_tokens:
            return 0
        return (mix.n_layers - mix.keep) * (math.ceil(self.tokens / mix.tile_tokens) - 1)

    def _waited(self, mix: Mix) -> float:
        """For copies: the first that comes back, and what the work beside the others is too short to hide."""
        if not mix.offload:
            return 0.0
        beside = sum(mix.groups[: mix.offload])
        joined = beside - mix.offload
        out = mix.offload * self.copy - beside * self.forward
        back = mix.offload * self.copy - beside * (self.layer - self.forward + self.recomputed) - joined * self.forward
        events = COPY_SECONDS * mix.offload * self.accumulation
        return self.copy + max(0.0, out) + max(0.0, back) + events


@dataclass(frozen=True, kw_only=True)
class Load:
    """What a step has to do.

    Args:
        tokens: of one micro-batch.
        attended: tokens that a token's row, or its document, has.
        supervised_share: share of the tokens that the loss counts.
        accumulation: micro-batches in a step.
    """

    tokens: float
    attended: float
    supervised_share: float
    accumulation: int


def copy_rate(device: DeviceSpec) -> float:
    """Bytes a second between card and host, in one direction."""
    return PCIE_BYTES[(device.capability or (8, 0)) >= (8, 0)]


def stock_pace(model: ModelSpec, device: DeviceSpec, dtype: str, load: Load) -> Pace:
    """On transformers' own layers: 4 operations a parameter and token, 6 recomputed."""
    c = DTYPE_BYTES[dtype]
    rate = (device.matmul_flops or 1e12) * STOCK_SHARE / load.accumulation
    attention = 4 * load.attended * model.n_heads * model.head_dim * model.n_layers
    forward = 2 * model.n_linear_params + attention
    head = 4 * model.vocab_size * model.d_model * load.supervised_share
    host = STOCK_SECONDS_PER_LAYER * load.accumulation
    mlp = 2 * mlp_params(model)
    once = load.tokens * forward / model.n_layers / rate
    return Pace(
        kept=load.tokens * (2 * forward + head) / rate,
        layer=2 * once,
        recomputed=once,
        recomputed_mlp=load.tokens * mlp / rate,
        forward=once,
        tile=0.0,
        copy=load.accumulation * load.tokens * model.d_model * c / copy_rate(device),
        tokens=load.tokens,
        accumulation=load.accumulation,
        host=(host * model.n_layers, host / 3),
        measured=device.matmul_flops is not None,
    )


def fused_pace(
    family: Family, model: ModelSpec, device: DeviceSpec, dtype: str, load: Load, *, quantized: bool, dense: bool
) -> Pace:
    """On fused layers. Recomputing stops before the down projection; of an MLP alone it is gate and up.

    A further tile unpacks gate, up and down in the forward; gate and up twice and down in the backward.
    """
    kernel = choose_kernel(family, device, dtype, model.head_dim, dense=dense)[0]
    layer = _Layer(model, device, DTYPE_BYTES[dtype], load, kernel, quantized)
    d, f = model.d_model, model.d_ff
    down, whole = d * f, model.n_linear_params / model.n_layers
    captured = not not_captured_because(family, model, device, dtype)
    gap = CAPTURED_SECONDS_PER_LAYER if captured else 0.0
    host = 0.0 if captured or device.kind == "cpu" else HOST_SECONDS_PER_LAYER * load.accumulation
    kept = layer.seconds(products=2 * whole, attention=7, moved=40 * d + 12 * f) + gap
    again = layer.seconds(products=whole - down, attention=2, moved=14 * d) + gap / 4
    mlp = layer.seconds(products=2 * down, attention=0, moved=3 * d) + gap / 8
    once = layer.seconds(products=whole, attention=2, moved=17 * d + 3 * f) + gap / 3
    n, tokens = load.accumulation, load.tokens
    return Pace(
        kept=n * (model.n_layers * kept + layer.head_seconds()),
        layer=n * kept,
        recomputed=n * again,
        recomputed_mlp=n * mlp,
        forward=n * once,
        tile=n * (layer.unpack_seconds(8 * down) + gap / 8),
        copy=n * tokens * d * DTYPE_BYTES[dtype] / copy_rate(device),
        tokens=tokens,
        accumulation=n,
        host=(host * model.n_layers, host / 3),
        measured=device.matmul_flops is not None,
    )


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
