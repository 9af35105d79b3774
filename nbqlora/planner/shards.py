"""Weights that are split over cards (FSDP2): what a card holds of them, what it gathers, and what that sends.

Of a layer, its NF4 bytes are split: they lie end to end, and each card has as many of their elements as the others. The
scales, embeddings, head, norms and adapters stay whole on each card. When a layer's turn comes, in the forward and in
the backward of each micro-batch, its bytes are gathered from all cards, and given back behind it; the next layer's are
on their way meanwhile. So beside its share a card holds two layers: the one at work, and the one that is coming. The
last layer stays from its forward to its backward.

A gather sends each card's share to all others, in a ring: of a layer's bytes the part ``(n - 1) / n``.
"""

from __future__ import annotations

from math import prod

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import ModelSpec

# As ``engine.sharded`` lays them: elements of fp32, and weights that begin at multiples of so many bytes.
ELEMENT_BYTES = 4
ALIGNED = 16
# The layer at work, and the one that is being gathered.
GATHERED_LAYERS = 2
NOT_CAPTURED = "each layer's weights are gathered from all cards when its turn comes"


def n_cards(config: FinetuneConfig) -> int:
    """Cards that train together; ``"all"`` was counted before."""
    return config.gpus if isinstance(config.gpus, int) else 1


def shards_of(config: FinetuneConfig) -> int:
    """Cards over which a layer's weights are split, once ``fsdp`` is decided; 1 for whole on each."""
    return n_cards(config) if config.fsdp is True else 1


def layer_bytes(model: ModelSpec) -> int:
    """NF4 bytes of one layer: two weights a byte, without their scales."""
    return sum(map(prod, model.linear_shapes.values())) // 2


def share_bytes(model: ModelSpec, shards: int) -> int:
    """What each card holds of one layer: as many elements, rounded up."""
    weights = (n * k // 2 for n, k in model.linear_shapes.values())
    elements = sum(-(-size // ALIGNED) for size in weights) * ALIGNED // ELEMENT_BYTES
    return -(-elements // shards) * ELEMENT_BYTES


def spared_bytes(model: ModelSpec, shards: int) -> int:
    """What a card need not hold of all layers."""
    return model.n_layers * (layer_bytes(model) - share_bytes(model, shards)) if shards > 1 else 0


def gathered_bytes(model: ModelSpec, shards: int) -> int:
    """What is there of gathered layers while a run trains."""
    return GATHERED_LAYERS * shards * share_bytes(model, shards) if shards > 1 else 0


def sent_bytes(model: ModelSpec, shards: int) -> int:
    """What a card sends in one gather of one layer."""
    return (shards - 1) * share_bytes(model, shards)


def step_bytes(model: ModelSpec, shards: int, accumulation: int) -> int:
    """What a card sends of weights in a step: of each layer twice a micro-batch, of the last one once."""
    return accumulation * (2 * model.n_layers - 1) * sent_bytes(model, shards)
