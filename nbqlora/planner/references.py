"""Temporaries of elementwise work in plain torch, which a CPU does; a kernel on a card has none.

Read off the references in ``nbqlora.kernels``: how many fp32 tensors of the width exist at once beside arguments and
results. Where the dtype is fp32 already, arguments are not copied.
"""

from __future__ import annotations

from nbqlora.planner.fused import FusedLayer


def norm(layer: FusedLayer, width: int, *, with_sum: bool = False) -> int:
    """Of a norm; ``with_sum``: the residual is added in the same call."""
    if layer.c == 4:
        return _fp32(layer, width, 2)
    rounded = layer.tokens * width * layer.c if layer.family.norm == "llama" else 0
    return max(_fp32(layer, width, 4 if with_sum else 3), _fp32(layer, width, 3) + rounded)


def norm_backward(layer: FusedLayer, width: int, *, with_residual: bool = False) -> int:
    """Of a norm's backward; ``with_residual``: a gradient is added in the same call."""
    return _fp32(layer, width, 5 if layer.c < 4 and with_residual else 4)


def glu(layer: FusedLayer) -> int:
    """Of the activation: its share, its value, and what its slope is made of."""
    return _fp32(layer, layer.f, _activation(layer) + (1 if layer.c < 4 else 0))


def glu_backward(layer: FusedLayer) -> int:
    """Of the activation's backward: three results before the first is written, value and slope."""
    if layer.c == 4:
        return _fp32(layer, layer.f, 5)
    return _fp32(layer, layer.f, _activation(layer) + 3)


def low_rank_add(layer: FusedLayer, width: int) -> int:
    """Of a small product added to a wide tensor: the sum, and that tensor in fp32."""
    return _fp32(layer, width, 1 if layer.c == 4 else 2)


def dropout(layer: FusedLayer, width: int) -> int:
    """Of dropout: random numbers, then the scaled input, what is left of it, and the mask."""
    return _fp32(layer, width, 2) + (layer.tokens * width if layer.reference else 0)


def rope(layer: FusedLayer) -> int:
    """Of rotating q and then k: two halves and their products, or the result; q's is still there while k's is made.

    In half precision cosines and sines are copied too.
    """
    q, kv = layer.q, layer.attended.kv
    if layer.c == 4:
        return _fp32(layer, max(2 * q, q + 2 * kv), 1)
    return _fp32(layer, max(3 * q, 2 * q + kv, q + 3 * kv) + 2 * layer.attended.head_dim, 1)


def _activation(layer: FusedLayer) -> int:
    """Tensors that exist at once in an activation and its slope: silu's, or one more for Gemma's gelu."""
    return 5 if layer.family.norm == "gemma" else 4


def _fp32(layer: FusedLayer, width: int, count: int) -> int:
    return count * 4 * layer.tokens * width if layer.reference else 0
