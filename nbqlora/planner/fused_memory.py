"""Memory of a run on fused layers, by the policies of its layers: the peak is the largest of these moments.

- the forward of the last layer of each policy, when all before it have kept what they keep;
- the loss: hidden states, their gradients, and one chunk of logits;
- the first two layers that each policy has in the backward: what is kept up to them, and their own work. What keeps
  the most stands last, so that it is free again when the turn of the others comes;
- a group of joined layers, whose inputs are made and exist together (``joined``).

The chunk of the loss is as large as the backward's peak leaves room for, since that is needed anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.families import Family
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import BatchLayout, DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import MIB
from nbqlora.planner.batch import MicroBatch
from nbqlora.planner.fused import FusedLayer, captures, fused_layer
from nbqlora.planner.logits import LOSS_CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK, logit_bytes, power_of_two
from nbqlora.planner.mix import Mix
from nbqlora.planner.moments import LayerBytes, layer_bytes, moments
from nbqlora.planner.shards import shards_of
from nbqlora.planner.standing import DTYPE_BYTES, adapter_params, standing_bytes

# A chunk of the loss may always be so large. What a small one costs, as the head is read for each: 1B 4 x 512 on an
# H100 took 27.3 ms with 256 tokens and 2.99 GiB, 25.9 ms with 1,024 and 3.12 GiB.
FREE_CHUNK_BYTES = 32 * MIB
# Token ids, labels and positions, and a captured step's own of them.
INPUT_BYTES = 64
# Shapes that are captured beside the largest one keep the gradient of their hidden states: 7, 6, 5, 4 and 3 eighths.
OTHER_SHAPES = 25 / 8
# The fewest tokens of a tile: below it a matmul is limited by reading its weight.
MIN_TILE = 512


@dataclass(frozen=True, kw_only=True)
class FusedMemory:
    """What one micro-batch takes, for any mix of layers.

    Args:
        standing: what is there all the time, by category, with the arena.
        always: bytes that are there from the forward to the end of the backward, whatever is kept.
        layer: one of the layers; all are alike.
        behind: bytes of the gradient that a captured step holds beyond the last layer's backward.
        losses: bytes of the loss without a chunk, and for each token of a chunk; of an eager and of a captured step.
        logits: bytes of logits for each token of a chunk.
        most_rows: tokens that a chunk can use.
        joins: layers may join; not where that would take the weights of two at once.
    """

    standing: Mapping[MemoryCategory, int]
    always: int
    layer: FusedLayer
    behind: int
    losses: Sequence[tuple[int, int]]
    logits: int
    most_rows: int
    joins: bool = True
    _layers: dict[int, LayerBytes] = field(default_factory=dict, init=False, repr=False)

    mlp_alone = True

    def total_bytes(self, mix: Mix) -> int:
        """The peak."""
        stored, working = self._moments(mix)
        loss = self._loss(self._chunk(stored, working))
        return sum(self.standing.values()) + self._always(mix) + max(working, stored + loss)

    def budget(self, mix: Mix) -> MemoryBudget:
        """The peak by category."""
        stored, working = self._moments(mix)
        loss = self._loss(self._chunk(stored, working))
        in_loss = stored + loss > working
        m = MemoryCategory
        parts = {
            **self.standing,
            m.ACTIVATIONS: self._always(mix) + (stored if in_loss else working),
            m.LOSS: loss if in_loss else 0,
        }
        return MemoryBudget(by_category={k: v for k, v in parts.items() if v})

    def loss_chunk_tokens(self, mix: Mix) -> int:
        """Supervised tokens whose logits exist at once: a power of two from 64 to 4,096, within 256 MiB."""
        return self._chunk(*self._moments(mix))

    @property
    def input_bytes(self) -> int:
        """Of one layer's input, which is what a layer that offloads takes on the host."""
        return self.layer.rows(self.layer.d)

    @property
    def tiles(self) -> tuple[int, ...]:
        """Tokens that an MLP may take at once, the most first; none where adapters drop: a mask is drawn by place."""
        if self.layer.dropout:
            return ()
        most = (self.layer.tokens - 1).bit_length()
        return tuple(1 << n for n in range(most - 1, MIN_TILE.bit_length() - 2, -1))

    def _always(self, mix: Mix) -> int:
        """With what is offloaded where host and device are one."""
        return self.always + (0 if self.layer.attended.on_card else mix.offload * self.input_bytes)

    def _moments(self, mix: Mix) -> tuple[int, int]:
        """What is kept when all layers have run, and the peak of forward and backward; both without what is always."""
        tile = mix.tile_tokens
        if tile not in self._layers:
            self._layers[tile] = layer_bytes(self.layer, tile, self.behind)
        return moments(self._layers[tile], mix)

    def _loss(self, chunk: int) -> int:
        return max(hidden + row * chunk for hidden, row in self.losses)

    def _chunk(self, stored: int, working: int) -> int:
        """Tokens of a chunk that fit beside the hidden states before the peak of the backward is reached."""
        room = working - stored
        free = min(max(FREE_CHUNK_BYTES, room - hidden) // row for hidden, row in self.losses)
        fits = power_of_two(min(LOSS_CHUNK_BYTES // self.logits, free))
        return max(MIN_CHUNK, min(MAX_CHUNK, self.most_rows, fits))


def fused_memory(
    config: FinetuneConfig,
    family: Family,
    model: ModelSpec,
    device: DeviceSpec,
    dtype: str,
    batch: MicroBatch,
) -> FusedMemory:
    """What one micro-batch takes."""
    captured = captures(family, model, config, device, dtype, batch)
    c = DTYPE_BYTES[dtype]
    layer = fused_layer(family, model, config, device, dtype, batch)
    standing = standing_bytes(config, model, device, c)
    standing[MemoryCategory.ADAPTER] += adapter_params(model, config) * c if c < 4 else 0
    standing[MemoryCategory.DEQUANT] = layer.arena_bytes
    width, logits = layer.rows(layer.d), model.vocab_size * logit_bytes(model, device, c)
    several = batch.ragged or batch.layout is BatchLayout.PACKED
    return FusedMemory(
        standing=standing,
        always=layer.rows(2 * model.head_dim)
        + INPUT_BYTES * layer.tokens
        + (int(OTHER_SHAPES * width) if captured and several else 0),
        layer=layer,
        behind=width if captured else 0,
        losses=_losses(layer, batch, model.vocab_size * c, logits, captured=captured),
        logits=logits,
        most_rows=2 * power_of_two(max(1, batch.supervised_tokens - 1)),
        joins=shards_of(config) == 1,
    )


def _losses(layer: FusedLayer, batch: MicroBatch, result: int, logits: int, *, captured: bool) -> list[tuple[int, int]]:
    """Bytes of the loss: what it needs whatever the chunk, and for each token of a chunk.

    Eager, as also the first step of each shape is: the last layer's output, its norm and a factor a token; the rows
    that are supervised, where they stand, and their gradient. A chunk has its logits, then with them as their own
    gradient that of its rows. Captured: the last layer's output and the gradient of it, and for a chunk its rows and
    their norm too.

    Args:
        result: bytes of a token's logits when they are their own gradient.
        logits: bytes at their peak.
    """
    all_tokens, width, n = layer.rows(layer.d), layer.d * layer.c, batch.supervised_tokens
    eager = (2 * all_tokens + 4 * layer.tokens + n * (2 * width + 16), max(logits, result + width))
    return [eager, (2 * all_tokens, max(logits + 2 * width, result + 3 * width))] if captured else [eager]
