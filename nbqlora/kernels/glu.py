"""Gated linear unit of an MLP, ``h = act(gate) * up``, forward and backward, in place if asked.

With a(g) the activation and a'(g) its derivative: ``dgate = dh * up * a'(gate)``, ``dup = dh * a(gate)``. Backward can
write h again from the same reads: the gradient of the down projection's adapter needs it, and keeping it instead would
hold ``[tokens, f]`` for every layer.

Activations, with S the logistic function: "silu" is ``g * S(g)``; "gelu" is ``g * P(g)`` with P the normal
distribution function, by erf; "gelu_tanh" is ``g * S(2u)`` with ``u = sqrt(2/pi) * (g + 0.044715 g^3)``, which is
``g/2 * (1 + tanh(u))`` without a tanh: nothing cancels for negative g and no exponential overflows into a NaN.

Each is computed in fp32 and rounded once. The eager path writes act(gate), rounded, and reads it again: five trips of
``[tokens, f]`` forward where this makes three; backward three reads and two or three writes.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

from nbqlora.kernels._launch import jit, row_stride, tl, triton, use_triton

Activation = Literal["silu", "gelu", "gelu_tanh"]

SQRT_HALF = math.sqrt(0.5)
# u and its derivative are (TANH_LINEAR + TANH_CUBIC * g^2) * g and TANH_LINEAR + 3 * TANH_CUBIC * g^2.
TANH_LINEAR = math.sqrt(2 / math.pi)
TANH_CUBIC = 0.044715 * TANH_LINEAR
# The density of the normal distribution at 0.
NORMAL_PEAK = 1 / math.sqrt(2 * math.pi)

# 16-byte loads of two bytes an element, two in flight of each tensor for each of 128 threads.
BLOCK = 2048
NUM_WARPS = 4


def glu_reference(
    gate: torch.Tensor, up: torch.Tensor, *, activation: Activation, out: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`glu` in plain torch, on any device; fp64 stays fp64."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    return h.copy_(_act(gate.to(wide), activation)[0] * up.to(wide))


def glu_backward_reference(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: Activation,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    h: torch.Tensor | None = None,
) -> None:
    """:func:`glu_backward` in plain torch, on any device; fp64 stays fp64."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    wide_dh, wide_up = dh.to(wide), up.to(wide)
    act, slope = _act(gate.to(wide), activation)
    # All three exist before the first is written: the outputs may be the inputs.
    new_dgate, new_dup, new_h = wide_dh * wide_up * slope, wide_dh * act, act * wide_up
    dgate.copy_(new_dgate)
    dup.copy_(new_dup)
    if h is not None:
        h.copy_(new_h)


def _act(g: torch.Tensor, activation: Activation) -> tuple[torch.Tensor, torch.Tensor]:
    """The activation of ``g`` and its derivative."""
    if activation == "silu":
        share = torch.sigmoid(g)
        return g * share, share * (1 + g * (1 - share))
    if activation == "gelu":
        share = 0.5 * (1 + torch.erf(g * SQRT_HALF))
        return g * share, share + g * NORMAL_PEAK * torch.exp(-0.5 * g * g)
    share = torch.sigmoid(2 * g * (TANH_LINEAR + TANH_CUBIC * g * g))
    return g * share, share + g * share * (1 - share) * 2 * (TANH_LINEAR + 3 * TANH_CUBIC * g * g)


@jit
def _share(b_g, ACTIVATION: tl.constexpr):
    """What the activation multiplies g by. Where an exponential becomes inf, that is 0. Numbers: see the constants."""
    if ACTIVATION == "silu":
        b_share = 1.0 / (1.0 + tl.exp(-b_g))
    elif ACTIVATION == "gelu":
        b_share = 0.5 + 0.5 * tl.math.erf(b_g * 0.7071067811865476)
    else:
        b_share = 1.0 / (1.0 + tl.exp(b_g * (-1.5957691216057308 - 0.07135481627260025 * b_g * b_g)))
    return b_share


@jit
def _slope(b_g, b_share, ACTIVATION: tl.constexpr):
    """The derivative of g * share(g)."""
    if ACTIVATION == "silu":
        b_slope = b_share * (1.0 + b_g * (1.0 - b_share))
    elif ACTIVATION == "gelu":
        b_slope = b_share + b_g * 0.3989422804014327 * tl.exp(-0.5 * b_g * b_g)
    else:
        b_rate = 1.5957691216057308 + 0.21406444881780073 * b_g * b_g
        b_slope = b_share * (1.0 + b_g * (1.0 - b_share) * b_rate)
    return b_slope


@jit
def _glu_fwd_kernel(p_gate, p_up, p_h, f, gate_row, up_row, h_row, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    i_row = (tl.program_id(0) // tl.cdiv(f, BLOCK)).to(tl.int64)
    o = tl.program_id(0) % tl.cdiv(f, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    m = o < f
    b_gate = tl.load(p_gate + i_row * gate_row + o, mask=m).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_row + o, mask=m).to(tl.float32)
    b_h = b_gate * _share(b_gate, ACTIVATION) * b_up
    tl.store(p_h + i_row * h_row + o, b_h.to(p_h.dtype.element_ty), mask=m)


@jit
def _glu_bwd_kernel(
    p_dh, p_gate, p_up, p_dgate, p_dup, p_h,
    f, dh_row, gate_row, up_row, dgate_row, dup_row, h_row,
    ACTIVATION: tl.constexpr, HAS_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row = (tl.program_id(0) // tl.cdiv(f, BLOCK)).to(tl.int64)
    o = tl.program_id(0) % tl.cdiv(f, BLOCK) * BLOCK + tl.arange(0, BLOCK)
    m = o < f
    # The outputs may be the inputs: every element is read here before any is written below.
    b_dh = tl.load(p_dh + i_row * dh_row + o, mask=m).to(tl.float32)
    b_gate = tl.load(p_gate + i_row * gate_row + o, mask=m).to(tl.float32)
    b_up = tl.load(p_up + i_row * up_row + o, mask=m).to(tl.float32)
    b_share = _share(b_gate, ACTIVATION)
    b_act = b_gate * b_share
    b_dgate = b_dh * b_up * _slope(b_gate, b_share, ACTIVATION)
    tl.store(p_dgate + i_row * dgate_row + o, b_dgate.to(p_dgate.dtype.element_ty), mask=m)
    tl.store(p_dup + i_row * dup_row + o, (b_dh * b_act).to(p_dup.dtype.element_ty), mask=m)
    if HAS_H:
        tl.store(p_h + i_row * h_row + o, (b_act * b_up).to(p_h.dtype.element_ty), mask=m)


def glu_triton(
    gate: torch.Tensor, up: torch.Tensor, *, activation: Activation, out: torch.Tensor | None = None
) -> torch.Tensor:
    """:func:`glu` in one launch."""
    rows, f = gate.shape
    h = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    strides = (row_stride(gate), row_stride(up), row_stride(h))
    grid = (rows * triton.cdiv(f, BLOCK),)
    _glu_fwd_kernel[grid](gate, up, h, f, *strides, ACTIVATION=activation, BLOCK=BLOCK, num_warps=NUM_WARPS)
    return h


def glu_backward_triton(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: Activation,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    h: torch.Tensor | None = None,
) -> None:
    """:func:`glu_backward` in one launch."""
    rows, f = gate.shape
    tensors = (dh, gate, up, dgate, dup, h)
    strides = (0 if tensor is None else row_stride(tensor) for tensor in tensors)
    _glu_bwd_kernel[(rows * triton.cdiv(f, BLOCK),)](
        *tensors, f, *strides, ACTIVATION=activation, HAS_H=h is not None, BLOCK=BLOCK, num_warps=NUM_WARPS
    )


def glu(
    gate: torch.Tensor, up: torch.Tensor, *, activation: Activation, out: torch.Tensor | None = None
) -> torch.Tensor:
    """``act(gate) * up``.

    Args:
        gate: ``[tokens, f]`` with any row stride, as for all below.
        up: ``[tokens, f]``.
        activation: of the gate.
        out: where h goes; may be ``gate`` or ``up`` itself. Allocated, in the dtype of ``gate``, when None.

    Returns:
        h, ``[tokens, f]``.
    """
    op = glu_triton if use_triton(gate) else glu_reference
    return op(gate, up, activation=activation, out=out)


def glu_backward(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    *,
    activation: Activation,
    dgate: torch.Tensor,
    dup: torch.Tensor,
    h: torch.Tensor | None = None,
) -> None:
    """Gradients of :func:`glu`, and its output again.

    Args:
        dh: gradient of h, ``[tokens, f]`` with any row stride, as for all below.
        gate: as in the forward.
        up: as in the forward.
        activation: as in the forward.
        dgate: where the gradient of ``gate`` goes.
        dup: where the gradient of ``up`` goes.
        h: where the forward's output goes again, if it is needed.

    Each output may be the memory of one of the inputs, with its strides, but not that of another output.
    """
    op = glu_backward_triton if use_triton(gate) else glu_backward_reference
    op(dh, gate, up, activation=activation, dgate=dgate, dup=dup, h=h)
