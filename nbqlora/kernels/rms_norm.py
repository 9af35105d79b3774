"""RMS norm of rows or of heads, with the residual addition folded into it, forward and backward.

Formula: with s = x, or s = round(residual + alpha * x) when the addition is fused, ``r = 1 / sqrt(mean(s^2) + eps)``
and ``y = w * s * r``. Models differ in where they round: "llama" rounds ``s * r`` to the dtype of x before the weight,
"fp32" (Olmo 2) after it, "gemma" has ``1 + w`` in place of w and rounds after it. Backward, with g = w * dy and
n = s * r: ``ds = r * (g - n * mean(g * n))``, plus the gradient that reaches s past the norm. The weight is frozen:
no gradient of it is made. What the norm wrote can be written again on the way: who keeps s alone needs y for the
gradients of what read it, and a norm of its own for that would read s once more.

Why one kernel: the norm moves bytes and does little else, so each tensor is read once and written once, all of a
program's loads are issued before the first reduction waits for them, and the sum of the residual never makes a trip
of its own (eager: five reads and three writes of ``[rows, d]`` for the addition and the norm; here two and two).

A program holds whole rows in registers: one row of a hidden state, several rows where rows are short (the norms of q
and k have d = 64 to 256 and tokens * heads rows). Kept for backward: s, and r, four bytes a row, or made again from s.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch

from nbqlora.kernels._launch import jit, next_power_of_2, tl, triton, use_triton

Style = Literal["llama", "gemma", "fp32"]

# Elements of a tile: enough 16-byte loads in flight, few enough registers that several programs share an SM.
TILE = 4096


def rms_norm_reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    style: Style = "llama",
    out: torch.Tensor | None = None,
    sum_with: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` in plain torch, on any device; fp64 stays fp64."""
    _check_sum(x, sum_with, sum_out)
    wide = torch.promote_types(x.dtype, torch.float32)
    s = x.to(wide)
    if sum_with is not None and sum_out is not None:
        s = sum_out.copy_(sum_with.to(wide) + alpha * s).to(wide)
    rstd = torch.rsqrt(s.square().mean(-1, keepdim=True) + eps)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return y.copy_(_scaled(s * rstd, weight, x.dtype, style)), rstd.reshape(-1)


def rms_norm_backward_reference(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor | None = None,
    *,
    style: Style = "llama",
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    eps: float | None = None,
    y_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_backward` in plain torch, on any device; fp64 stays fp64."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if rstd is None:
        rstd = torch.rsqrt(x.to(wide).square().mean(-1) + _needed(eps))
    r = rstd.to(wide).view(*x.shape[:-1], 1)
    normed = x.to(wide) * r
    g = dy.to(wide) * _scale(weight.to(wide), style)
    ds = r * (g - normed * (g * normed).mean(-1, keepdim=True))
    if residual_grad is not None:
        ds = ds + residual_grad.to(wide)
    # Everything was read: y_out may be an input.
    if y_out is not None:
        y_out.copy_(_scaled(normed, weight, x.dtype, style))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    return dx.copy_(ds)


def _scaled(normed: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype, style: Style) -> torch.Tensor:
    """The norm's output, rounded on the way where the model does."""
    wide = normed.dtype
    if style == "llama":
        normed = normed.to(dtype).to(wide)
    return normed * _scale(weight.to(wide), style)


def _scale(weight: torch.Tensor, style: Style) -> torch.Tensor:
    """What multiplies the normed row."""
    return 1 + weight if style == "gemma" else weight


@jit
def _row_offsets(i_tile, n_rows, heads, BLOCK_ROWS: tl.constexpr):
    """Row ``i`` is head ``i % heads`` of token ``i // heads``."""
    o_row = i_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    return o_row, (o_row // heads).to(tl.int64), (o_row % heads).to(tl.int64), o_row < n_rows


@jit
def _load_weight(p_weight, o_d, m, BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The weight once a row, ``[BLOCK_ROWS, BLOCK_D]``; all but the first row are found in L1.

    A single row would be laid out over the threads in another way than x, and the compiler then takes x through shared
    memory (backward, heads of 256, bf16, H100: 1.9 TB/s instead of 2.9).
    """
    return tl.load(tl.broadcast_to(p_weight + o_d, (BLOCK_ROWS, BLOCK_D)), mask=m, other=0.0).to(tl.float32)


@jit
def _rstd(b_s, d, eps):
    """``[BLOCK_ROWS, 1]``; the same in both directions, so that the backward writes the forward's bits."""
    return tl.rsqrt(tl.sum(b_s * b_s, axis=1) / d + eps)[:, None]


@jit
def _store_norm(p_y, o_y, m, b_normed, b_weight, DTYPE: tl.constexpr, ROUND_NORMED: tl.constexpr):
    """The norm's output; DTYPE is that of what was normed."""
    if ROUND_NORMED:
        b_normed = b_normed.to(DTYPE).to(tl.float32)
    tl.store(p_y + o_y, (b_normed * b_weight).to(p_y.dtype.element_ty), mask=m)


@partial(jit, do_not_specialize=("n_rows",))
def _rms_norm_fwd_kernel(
    p_x, p_weight, p_y, p_rstd, p_sum_with, p_sum_out,
    n_rows, heads, d,
    x_token, x_head, y_token, y_head, sum_with_row, sum_out_row,
    eps, alpha,
    ROUND_NORMED: tl.constexpr, ONE_PLUS_WEIGHT: tl.constexpr, HAS_SUM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row, o_token, o_head, m_row = _row_offsets(tl.program_id(0), n_rows, heads, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m = m_row[:, None] & (o_d < d)

    b_s = tl.load(p_x + (o_token * x_token + o_head * x_head)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_weight = _load_weight(p_weight, o_d, m, BLOCK_ROWS, BLOCK_D)
    if HAS_SUM:
        b_with = tl.load(p_sum_with + (o_token * sum_with_row)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
        b_sum = (b_with + alpha * b_s).to(p_sum_out.dtype.element_ty)
        tl.store(p_sum_out + (o_token * sum_out_row)[:, None] + o_d, b_sum, mask=m)
        b_s = b_sum.to(tl.float32)

    b_rstd = _rstd(b_s, d, eps)
    tl.store(p_rstd + o_row[:, None], b_rstd, mask=m_row[:, None])
    if ONE_PLUS_WEIGHT:
        b_weight += 1.0
    o_y = (o_token * y_token + o_head * y_head)[:, None] + o_d
    _store_norm(p_y, o_y, m, b_s * b_rstd, b_weight, p_x.dtype.element_ty, ROUND_NORMED)


@partial(jit, do_not_specialize=("n_rows",))
def _rms_norm_bwd_kernel(
    p_dy, p_x, p_weight, p_rstd, p_residual_grad, p_dx, p_y,
    n_rows, heads, d,
    dy_token, dy_head, x_token, x_head, residual_token, residual_head, dx_token, dx_head, y_token, y_head,
    eps,
    ROUND_NORMED: tl.constexpr, ONE_PLUS_WEIGHT: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row, o_token, o_head, m_row = _row_offsets(tl.program_id(0), n_rows, heads, BLOCK_ROWS)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m = m_row[:, None] & (o_d < d)

    b_dy = tl.load(p_dy + (o_token * dy_token + o_head * dy_head)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + (o_token * x_token + o_head * x_head)[:, None] + o_d, mask=m, other=0.0).to(tl.float32)
    b_weight = _load_weight(p_weight, o_d, m, BLOCK_ROWS, BLOCK_D)
    if p_rstd is not None:
        b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)[:, None]
    if HAS_RESIDUAL:  # asked for before the reduction, so that it arrives meanwhile
        o_residual = (o_token * residual_token + o_head * residual_head)[:, None] + o_d
        b_residual = tl.load(p_residual_grad + o_residual, mask=m, other=0.0).to(tl.float32)

    if p_rstd is None:
        b_rstd = _rstd(b_x, d, eps)
    if ONE_PLUS_WEIGHT:
        b_weight += 1.0
    b_g = b_dy * b_weight
    b_normed = b_x * b_rstd
    b_mean = (tl.sum(b_g * b_normed, axis=1) / d)[:, None]
    # Behind the reduction: every input has been read, so that an output may lie in its place.
    if p_y is not None:
        o_y = (o_token * y_token + o_head * y_head)[:, None] + o_d
        _store_norm(p_y, o_y, m, b_normed, b_weight, p_x.dtype.element_ty, ROUND_NORMED)
    b_dx = b_rstd * (b_g - b_normed * b_mean)
    if HAS_RESIDUAL:
        b_dx += b_residual
    o_dx = (o_token * dx_token + o_head * dx_head)[:, None] + o_d
    tl.store(p_dx + o_dx, b_dx.to(p_dx.dtype.element_ty), mask=m)


def tile_of(d: int) -> dict[str, int]:
    """Rows and columns of a program's tile for rows of ``d`` elements, and its warps (16 elements a thread)."""
    block_d = next_power_of_2(d)
    block_rows = max(1, TILE // block_d)
    return {"BLOCK_ROWS": block_rows, "BLOCK_D": block_d, "num_warps": min(16, block_rows * block_d // 512)}


def rms_norm_triton(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    style: Style = "llama",
    out: torch.Tensor | None = None,
    sum_with: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`rms_norm` in one launch."""
    _check_sum(x, sum_with, sum_out)
    d = x.shape[-1]
    n_rows = x.numel() // d
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    rstd = torch.empty(n_rows, dtype=torch.float32, device=x.device)
    strides = (*_strides(x), *_strides(y), _strides(sum_with)[0], _strides(sum_out)[0])
    heads = x.shape[1] if x.dim() == 3 else 1
    tile = tile_of(d)
    _rms_norm_fwd_kernel[(triton.cdiv(n_rows, tile["BLOCK_ROWS"]),)](
        *(x, weight, y, rstd, sum_with, sum_out),
        *(n_rows, heads, d),
        *strides,
        *(eps, alpha),
        ROUND_NORMED=style == "llama",
        ONE_PLUS_WEIGHT=style == "gemma",
        HAS_SUM=sum_with is not None,
        **tile,
    )
    return y, rstd


def rms_norm_backward_triton(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor | None = None,
    *,
    style: Style = "llama",
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    eps: float | None = None,
    y_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`rms_norm_backward` in one launch."""
    d = x.shape[-1]
    n_rows = x.numel() // d
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    strides = (*_strides(dy), *_strides(x), *_strides(residual_grad), *_strides(dx), *_strides(y_out))
    heads = x.shape[1] if x.dim() == 3 else 1
    tile = tile_of(d)
    _rms_norm_bwd_kernel[(triton.cdiv(n_rows, tile["BLOCK_ROWS"]),)](
        *(dy, x, weight, rstd, residual_grad, dx, y_out),
        *(n_rows, heads, d),
        *strides,
        _needed(eps) if rstd is None else 0.0,
        ROUND_NORMED=style == "llama",
        ONE_PLUS_WEIGHT=style == "gemma",
        HAS_RESIDUAL=residual_grad is not None,
        **tile,
    )
    return dx


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Elements from token to token and from head to head of ``[rows, d]`` or ``[tokens, heads, d]``; none of None."""
    if x is None:
        return 0, 0
    if x.dim() not in (2, 3) or x.stride(-1) != 1:
        raise ValueError(
            "expected [rows, d] or [tokens, heads, d] with neighbouring elements, "
            f"got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _needed(eps: float | None) -> float:
    """What the forward's factors are made of, where they were not kept."""
    if eps is None:
        raise ValueError("rms_norm_backward needs rstd, or eps to make it again")
    return eps


def _check_sum(x: torch.Tensor, sum_with: torch.Tensor | None, sum_out: torch.Tensor | None) -> None:
    """The fused addition takes rows, and needs a place for its result."""
    if (sum_with is None) != (sum_out is None):
        raise ValueError("sum_with and sum_out come together: what is added to x, and where the sum is written")
    if sum_with is not None and (x.dim() != 2 or sum_with.shape != x.shape):
        raise ValueError(f"sum_with needs the shape of x, [rows, d]; got {tuple(sum_with.shape)} and {tuple(x.shape)}")


def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    style: Style = "llama",
    out: torch.Tensor | None = None,
    sum_with: torch.Tensor | None = None,
    sum_out: torch.Tensor | None = None,
    alpha: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm of each row of ``x``, or of ``sum_with + alpha * x``.

    Args:
        x: ``[rows, d]`` or ``[tokens, heads, d]``; the strides before the last are free. d up to 16384.
        weight: ``[d]``, in any dtype.
        eps: added to the mean square.
        style: where the model rounds, and whether 1 is added to the weight.
        out: where the norm goes, shaped as ``x``; allocated, in the dtype of ``x``, when None.
        sum_with: a residual ``[rows, d]`` to which ``alpha * x`` is added first.
        sum_out: where that sum goes, rounded to its dtype; may be ``sum_with`` or ``x`` itself.
        alpha: Granite's residual multiplier.

    Returns:
        The norm, and ``1 / sqrt(mean square + eps)`` as fp32 ``[rows]`` for the backward.

    Raises:
        ValueError: only one of ``sum_with`` and ``sum_out``, or shapes or strides that the op does not take.
    """
    op = rms_norm_triton if use_triton(x) else rms_norm_reference
    return op(x, weight, eps, style=style, out=out, sum_with=sum_with, sum_out=sum_out, alpha=alpha)


def rms_norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor | None = None,
    *,
    style: Style = "llama",
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    eps: float | None = None,
    y_out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of :func:`rms_norm` with respect to what was normed, and the norm again if it is asked for.

    Args:
        dy: gradient of the norm, shaped as ``x``, strided as it likes before the last dimension.
        x: what was normed: ``x`` of the forward, or its ``sum_out``.
        weight: ``[d]``, frozen.
        rstd: ``[rows]`` from the forward; None to make it again from ``x`` and ``eps``.
        style: as in the forward.
        residual_grad: gradient that reaches ``x`` past the norm; added before the one rounding.
        out: where the gradient goes. Allocated when None.
        eps: as in the forward; needed where ``rstd`` is None.
        y_out: where the norm is written once more, the forward's bits; nowhere when None.

    ``out`` and ``y_out`` may each be the memory of ``dy``, ``x`` or ``residual_grad``, with its strides: a row is read
    as a whole before any of it is written. They may not overlap each other.

    Returns:
        The gradient. With ``alpha`` in the forward, that of the added ``x`` is ``alpha`` times it.

    Raises:
        ValueError: neither ``rstd`` nor ``eps``, or shapes or strides that the op does not take.
    """
    op = rms_norm_backward_triton if use_triton(x) else rms_norm_backward_reference
    return op(dy, x, weight, rstd, style=style, residual_grad=residual_grad, out=out, eps=eps, y_out=y_out)
