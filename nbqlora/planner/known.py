"""Usual model shapes and cards as data, to plan for what is not at hand.

Shapes: the configs that Meta published with Llama 2 and Llama 3. Cards: capability and memory as their data sheets
have it; ``flops`` is what a 2048-cube matmul was measured at (H100), or taken to reach (40 % of the data sheet's dense
tensor rate on a T4, 80 % on an A100).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from nbqlora.core.specs import DeviceSpec, HeadSpec, ModelSpec
from nbqlora.core.units import GIB

# More than any plan asks for.
PLENTY_BYTES = 1 << 50
CONTEXT_BYTES = int(0.4 * GIB)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama config.

    Args:
        rule_of_thumb: minimum and recommended VRAM in GB, and the batch, as tables on the web have it for this size.
    """

    like: str
    layers: int
    d: int
    f: int
    heads: int
    kv: int
    vocab: int
    tied: bool
    rule_of_thumb: str


SMALL, MIDDLE = "8 / 16 GB, batch 4-8", "16 / 24 GB, batch 2-4"
SHAPES: Mapping[str, Shape] = {
    "1B": Shape(like="Llama-3.2-1B", layers=16, d=2048, f=8192, heads=32, kv=8, vocab=128256, tied=True,
                rule_of_thumb=SMALL),
    "3B": Shape(like="Llama-3.2-3B", layers=28, d=3072, f=8192, heads=24, kv=8, vocab=128256, tied=True,
                rule_of_thumb=SMALL),
    "7B": Shape(like="Llama-2-7b", layers=32, d=4096, f=11008, heads=32, kv=32, vocab=32000, tied=False,
                rule_of_thumb=MIDDLE),
    "8B": Shape(like="Llama-3.1-8B", layers=32, d=4096, f=14336, heads=32, kv=8, vocab=128256, tied=False,
                rule_of_thumb=MIDDLE),
    "13B": Shape(like="Llama-2-13b", layers=40, d=5120, f=13824, heads=40, kv=40, vocab=32000, tied=False,
                 rule_of_thumb="24 / 40 GB, batch 1-2"),
    "70B": Shape(like="Llama-3.1-70B", layers=80, d=8192, f=28672, heads=64, kv=8, vocab=128256, tied=False,
                 rule_of_thumb="80+ / 2 x 80 GB, batch 1"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """A card as far as speed goes."""

    capability: tuple[int, int]
    flops: float


CARDS: Mapping[str, Card] = {
    "T4": Card(capability=(7, 5), flops=2.6e13),
    "A100": Card(capability=(8, 0), flops=2.5e14),
    "H100": Card(capability=(9, 0), flops=7.9e14),
}


def model_of(name: str) -> ModelSpec:
    """The spec of a shape."""
    s = SHAPES[name]
    head_dim = s.d // s.heads
    small = s.kv * head_dim
    linears = {
        "q_proj": (s.d, s.d), "k_proj": (small, s.d), "v_proj": (small, s.d), "o_proj": (s.d, s.d),
        "gate_proj": (s.f, s.d), "up_proj": (s.f, s.d), "down_proj": (s.d, s.f),
    }  # fmt: skip
    n_linear = s.layers * sum(map(prod, linears.values()))
    return ModelSpec(
        name=name,
        architecture="llama",
        n_layers=s.layers,
        d_model=s.d,
        d_ff=s.f,
        n_heads=s.heads,
        n_kv_heads=s.kv,
        head_dim=head_dim,
        vocab_size=s.vocab,
        n_params=n_linear + s.vocab * s.d * (1 if s.tied else 2) + (2 * s.layers + 1) * s.d,
        n_linear_params=n_linear,
        linear_shapes=linears,
        head=HeadSpec(tied=s.tied),
    )


def device_of(name: str) -> DeviceSpec:
    """A card with more memory than anything needs, in a host that has as much."""
    card = CARDS[name]
    return DeviceSpec(
        kind="cuda",
        name=name,
        total_bytes=PLENTY_BYTES,
        free_bytes=PLENTY_BYTES,
        context_bytes=CONTEXT_BYTES,
        host_free_bytes=PLENTY_BYTES,
        disk_free_bytes=PLENTY_BYTES,
        capability=card.capability,
        has_bf16=card.capability >= (8, 0),
        has_triton=True,
        matmul_flops=card.flops,
    )
