"""How long a step takes, as a sum of what it computes and what it moves.

What leaves the card is copied while other work runs: it costs time where it takes longer than that, and the first input
that comes back is waited for. Measured rates of such copies are the machine's own and not known to a plan: 12 GB/s
are taken where the card's generation has PCIe 3, 25 elsewhere.

Where a layer's weights are split over cards, they are gathered while the layer before computes: a layer takes the
longer of the two, in the forward and in the backward. The first gather of a micro-batch has nothing to run beside.

Stock layers: 8B 2 x 2048 took 435 ms where its matmuls need 156, and a step never fell below 7 ms a layer, the time
the host needs to launch it (1B 4 x 512: 151 ms, 16 layers; 8B 2 x 512: 214 ms, 32 layers). transformers 5.17,
peft 0.21, bitsandbytes 0.50.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.planner.layer import mlp_params
from nbqlora.planner.mix import Mix
from nbqlora.planner.standing import DTYPE_BYTES

# Stock layers: share of the matmul rate, and what the host needs.
STOCK_SHARE = 0.36
STOCK_SECONDS_PER_LAYER = 0.007
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
        gather: of one layer's weights, in one direction; 0 where each card has them.
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
    gather: float = 0.0

    def seconds(self, mix: Mix) -> float:
        """Of a step."""
        return self._busy(mix) + self._waited(mix) + self.gathering(mix)

    def gathering(self, mix: Mix) -> float:
        """What layers wait for their weights, beyond what they compute meanwhile."""
        if not self.gather:
            return 0.0
        return self.gather + sum(n * max(0.0, self.gather - seconds) for n, seconds in self.beside(mix))

    def beside(self, mix: Mix) -> list[tuple[int, float]]:
        """What gathers run beside: how many, and seconds of each; forwards first, then backwards by policy.

        Beside the last layer's two runs one gather, and beside the first one's backward none.
        """
        slower = self._busy(mix) / (self.kept + self._computed(mix))
        backward = self.layer - self.forward
        tiles = self._more_tiles(mix) * self.tile / max(1, mix.n_layers - mix.keep)
        parts = (
            (mix.n_layers, self.forward),
            (mix.n_whole, backward + self.recomputed + tiles),
            (mix.recompute_mlp, backward + self.recomputed_mlp + tiles),
            (mix.keep, backward),
        )
        found = [(n, slower * seconds) for n, seconds in parts if n]
        return [(n - (place < 2), seconds) for place, (n, seconds) in enumerate(found)]

    def _busy(self, mix: Mix) -> float:
        """Of what is computed, or launched where the host is slower."""
        again = mix.n_whole + mix.recompute_mlp + mix.join + self._more_tiles(mix)
        return max(self.kept + self._computed(mix), self.host[0] + again * self.host[1])

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
