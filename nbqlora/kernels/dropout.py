"""Dropout whose mask is kept as a number: ``y = x * keep / (1 - p)`` with keep a function of seed, row and column.

The backward of dropout is dropout of the gradient with the same mask, so the same call with the same seed is both, and
nothing but the seed is held in between; a mask would be a byte for each input element of each adapter, in all layers.
The seed is on the device: drawing it and reading it makes nobody wait.

Philox (Salmon et al., 2011) turns a key and a counter into four 32-bit numbers at the price of one: here the key is the
seed, and the counter the row and a quarter of the column, so each element takes one of four and the arithmetic stays
below what reading and writing costs. Seven rounds are the fewest with which that paper's tests find nothing. The
reference draws from torch's generator instead: another mask of the same kind, so a run must not change between them.
"""

from __future__ import annotations

import torch

from nbqlora.kernels._launch import jit, row_stride, tl, triton, use_triton

# 16 bytes of a two-byte type for each of 128 threads.
BLOCK = 1024
NUM_WARPS = 4
ROUNDS = 7


def dropout_reference(x: torch.Tensor, seed: torch.Tensor, p: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`dropout` in plain torch, on any device; fp64 stays fp64. Reads the seed on the host."""
    out = _checked(x, p, out)
    # A CPU's generator takes 32 bits of its seed: these depend on all 64.
    mixed = int(seed) * 0x9E3779B97F4A7C15 % 2**64 >> 32
    generator = torch.Generator(x.device).manual_seed(mixed)
    keep = torch.rand(x.shape, generator=generator, device=x.device) >= p
    scaled = x.to(torch.promote_types(x.dtype, torch.float32)) * (1 / (1 - p))
    return out.copy_(torch.where(keep, scaled, 0))


@jit
def _dropout_fwd_kernel(p_x, p_seed, p_out, n, x_row, out_row, p, scale, BLOCK: tl.constexpr, ROUNDS: tl.constexpr):
    i_row = tl.program_id(0) // tl.cdiv(n, BLOCK)
    i_block = tl.program_id(0) % tl.cdiv(n, BLOCK)
    o_quad = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    b_none = o_quad * 0
    # Row and column are counters of their own: their product may be beyond 32 bits, and 64-bit Philox is slow.
    b_0, b_1, b_2, b_3 = tl.philox(tl.load(p_seed), o_quad, b_none + i_row, b_none, b_none, ROUNDS)
    b_random = tl.reshape(tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3)), [BLOCK])
    o = i_block * BLOCK + tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_row.to(tl.int64) * x_row + o, mask=o < n).to(tl.float32)
    b_y = tl.where(tl.uint_to_uniform_float(b_random) >= p, b_x * scale, 0.0)
    tl.store(p_out + i_row.to(tl.int64) * out_row + o, b_y.to(p_out.dtype.element_ty), mask=o < n)


def dropout_triton(x: torch.Tensor, seed: torch.Tensor, p: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """:func:`dropout` in one launch."""
    out = _checked(x, p, out)
    rows, n = x.shape
    _dropout_fwd_kernel[(rows * triton.cdiv(n, BLOCK),)](
        x, seed, out, n, row_stride(x), row_stride(out), float(p), 1 / (1 - p),
        BLOCK=BLOCK, ROUNDS=ROUNDS, num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _checked(x: torch.Tensor, p: float, out: torch.Tensor | None) -> torch.Tensor:
    """``out``, made if there is none yet."""
    row_stride(x)
    if not 0 <= p < 1:
        raise ValueError(f"a share of {p} cannot be dropped: it is from 0 to below 1")
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    row_stride(out)
    if out.shape != x.shape:
        raise ValueError(f"{tuple(x.shape)} does not fit into {tuple(out.shape)}")
    return out


def dropout(x: torch.Tensor, seed: torch.Tensor, p: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """Zero a share of the elements and scale up the others; with the same seed, always the same elements.

    Args:
        x: ``[rows, n]``, any row stride.
        seed: 0-d int64 on the device of ``x``.
        p: share that is dropped, from 0 to below 1.
        out: ``[rows, n]`` to write to, any row stride; may be ``x``.

    Returns:
        ``out``.

    Raises:
        ValueError: another share, shapes that do not fit, or elements of a row that are not neighbours.
    """
    op = dropout_triton if use_triton(x) else dropout_reference
    return op(x, seed, p, out)
