"""Logits of one chunk of supervised tokens: how many bytes they are, and how many tokens a chunk may have."""

from __future__ import annotations

from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.core.units import MIB

# Logits of one chunk, with what is made of them.
LOSS_CHUNK_BYTES = 256 * MIB
MIN_CHUNK, MAX_CHUNK = 64, 4096


def logit_bytes(model: ModelSpec, device: DeviceSpec, c: int) -> int:
    """Bytes of one logit at the loss's peak: it becomes its own gradient in place, on a card.

    Without Triton the reference makes it so, through fp32 copies: the scaled logit, its share and its gradient; with a
    cap, its tanh and that's slope.
    """
    if device.kind == "cuda" and device.has_triton:
        return c
    return c + (20 if model.head.logit_softcap else 12)


def power_of_two(n: int) -> int:
    """The largest that is not above ``n``; 1 for less."""
    return 1 << max(0, n.bit_length() - 1)
