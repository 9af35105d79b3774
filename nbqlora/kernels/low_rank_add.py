"""A product of small rank added to a wide tensor, together with the residual, in one pass.

Formula: ``out = residual + alpha * (y + u b^T)`` for y ``[tokens, d]``, u ``[tokens, r]`` and b ``[d, r]``; each value
is summed in fp32 and rounded once. cuBLAS adds ``u b^T`` in a pass of its own over y, and an addition of the residual
is another: for 4096 x 4096 in bf16 and r = 16 they take 82 us on an H100, whose memory moves what must be read and
written (y, residual, out: 99 MB) in 33.

No tensor cores (Triton has none for a T4): r fused multiply-adds an element, and the compiled loop has as many other
instructions again. By that count an H100 is busy for half of the time that its memory takes at r = 16, and for 1.7
times as long at r = 64, which is still less than two passes; a T4 always waits for its memory. A higher rank is left
to cuBLAS.

A program is one warp, with eight rows and so many columns that a thread has 32 sums. It takes several ranks at a time,
so that a thread reads 16 bytes of b's row, and the sum over these ranks is within the thread. y and the residual are
asked for first and begin the sum, so that a program holds nothing but sums while it multiplies. It goes on with the
rows below, for which b is in the first cache. A row behind the last is read as the last one, and only not written, so
that no load has to ask which rows there are.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from nbqlora.kernels._launch import jit, row_stride, tl, triton, use_triton

MAX_RANK = 64
# Rows of a tile, and tiles that a program does one below the other.
ROWS = 8
REPEATS = 4


def low_rank_add_reference(
    y: torch.Tensor,
    u: torch.Tensor,
    b: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`low_rank_add` in plain torch, on any device; fp64 stays fp64."""
    out = _checked(y, u, b, residual, out)
    wide = torch.promote_types(y.dtype, torch.float32)
    total = torch.addmm(y.to(wide), u.to(wide), b.to(wide).t(), beta=alpha, alpha=alpha)
    if residual is not None:
        total += residual
    return out.copy_(total)


@partial(jit, do_not_specialize=("tokens",))
def _low_rank_add_fwd_kernel(
    p_y, p_u, p_b, p_residual, p_out,
    tokens, d, y_row, u_row, b_row, residual_row, out_row, alpha,
    R: tl.constexpr, CHUNK: tl.constexpr, SCALED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, REPEATS: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) // tl.cdiv(d, COLS) * REPEATS
    o_col = tl.program_id(0) % tl.cdiv(d, COLS) * COLS + tl.arange(0, COLS)
    m_col = o_col < d
    # Ranks are the first axis, [CHUNK, ROWS, COLS]: then a thread has all ranks of a chunk, and adds them up alone.
    o_rank = tl.arange(0, CHUNK)[:, None, None]
    for i in range(REPEATS):
        o_row = (i_tile + i) * ROWS + tl.arange(0, ROWS)
        i_row = tl.minimum(o_row, tokens - 1).to(tl.int64)
        o_y = (i_row * y_row)[:, None] + o_col[None, :]
        b_sum = tl.load(p_y + o_y, mask=m_col[None, :], other=0.0).to(tl.float32)
        if p_residual is not None:
            o_residual = (i_row * residual_row)[:, None] + o_col[None, :]
            b_residual = tl.load(p_residual + o_residual, mask=m_col[None, :], other=0.0).to(tl.float32)
        if SCALED:
            b_sum *= alpha
        if p_residual is not None:
            b_sum += b_residual
        for i_rank in tl.static_range(0, R, CHUNK):
            o_u = (i_row * u_row)[None, :, None] + (i_rank + o_rank)
            b_u = tl.load(p_u + o_u).to(tl.float32)
            o_b = o_col[None, None, :] * b_row + (i_rank + o_rank)
            b_b = tl.load(p_b + o_b, mask=m_col[None, None, :], other=0.0).to(tl.float32)
            if SCALED:
                b_u *= alpha
            b_sum += tl.sum(b_u * b_b, axis=0)
        o_out = (i_row * out_row)[:, None] + o_col[None, :]
        m = (o_row < tokens)[:, None] & m_col[None, :]
        tl.store(p_out + o_out, b_sum.to(p_out.dtype.element_ty), mask=m)


def tile_of(r: int, item_bytes: int) -> dict[str, Any]:
    """What the kernel is compiled for, beyond the rank: see the head of this file."""
    return {"CHUNK": math.gcd(r, 16 // item_bytes), "ROWS": ROWS, "COLS": 128, "REPEATS": REPEATS, "num_warps": 1}


def low_rank_add_triton(
    y: torch.Tensor,
    u: torch.Tensor,
    b: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`low_rank_add` in one launch; through cuBLAS where the rank is above ``MAX_RANK``."""
    out = _checked(y, u, b, residual, out)
    (tokens, d), r = y.shape, u.shape[1]
    if r > MAX_RANK:
        return _by_products(y, u, b, residual, alpha, out)
    tile = tile_of(r, b.element_size())
    grid = (triton.cdiv(tokens, ROWS * REPEATS) * triton.cdiv(d, tile["COLS"]),)
    _low_rank_add_fwd_kernel[grid](
        y, u, b, residual, out,
        tokens, d, row_stride(y), row_stride(u), row_stride(b), 0 if residual is None else row_stride(residual),
        row_stride(out), float(alpha), R=r, SCALED=alpha != 1.0, **tile,
    )  # fmt: skip
    return out


def _by_products(
    y: torch.Tensor, u: torch.Tensor, b: torch.Tensor, residual: torch.Tensor | None, alpha: float, out: torch.Tensor
) -> torch.Tensor:
    """Two passes, with a tensor in between where there is a residual."""
    if residual is None:
        return torch.addmm(y, u, b.t(), beta=alpha, alpha=alpha, out=out)
    return torch.add(residual, torch.addmm(y, u, b.t()), alpha=alpha, out=out)


def _checked(
    y: torch.Tensor, u: torch.Tensor, b: torch.Tensor, residual: torch.Tensor | None, out: torch.Tensor | None
) -> torch.Tensor:
    """``out``, made if there is none yet."""
    if out is None:
        out = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    for rows in (y, u, b, out) if residual is None else (y, u, b, out, residual):
        row_stride(rows)
    fits = u.shape[0] == y.shape[0] and b.shape == (y.shape[1], u.shape[1])
    if not fits or out.shape != y.shape or (residual is not None and residual.shape != y.shape):
        shapes = ", ".join(str(tuple(x.shape)) for x in (y, u, b, residual, out) if x is not None)
        raise ValueError(f"y [tokens, d], u [tokens, r], b [d, r] and tensors as y do not fit together: {shapes}")
    return out


def low_rank_add(
    y: torch.Tensor,
    u: torch.Tensor,
    b: torch.Tensor,
    *,
    residual: torch.Tensor | None = None,
    alpha: float = 1.0,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """``residual + alpha * (y + u b^T)``, without a residual ``alpha * (y + u b^T)``.

    Args:
        y: ``[tokens, d]`` with any row stride, as for all.
        u: ``[tokens, r]``, in the dtype of ``y``; quickest where r is a multiple of 8.
        b: ``[d, r]`` in the dtype of ``y``.
        residual: ``[tokens, d]``, in any dtype.
        alpha: Granite's residual multiplier.
        out: where the sum goes; may be ``y`` or ``residual`` itself. Allocated, in the dtype of ``y``, when None.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes or strides that the op does not take.
    """
    op = low_rank_add_triton if use_triton(y) else low_rank_add_reference
    return op(y, u, b, residual=residual, alpha=alpha, out=out)
