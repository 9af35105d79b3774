"""Rotary position embedding of q and k in one launch, in place if asked, and its transpose for the backward.

Formula, per head, over the first ``rot`` dims in two halves (the convention of transformers' ``rotate_half``)::

    q1' = q1 * cos1 - q2 * sin1        transposed:  g1' = g1 * cos1 + g2 * sin2
    q2' = q2 * cos2 + q1 * sin2                     g2' = g2 * cos2 - g1 * sin1

with cos1, cos2 the halves of a token's row of ``cos``, likewise sin. In transformers both halves are equal; this op
does not rely on it (the second half costs one per cent of the bytes). Dims past ``rot`` pass through.

All arithmetic is fp32 with one rounding at the end, where the eager path rounds each product and the sum. A program
rotates a share of one token's heads, so that a token's cos and sin are read once for them all. The backward can copy
dv in the same launch: dq, dk and dv then land side by side in one buffer, ready for one product with the stacked
projections.
"""

from __future__ import annotations

import torch

from nbqlora.kernels._launch import jit, next_power_of_2, tl, use_triton

# Largest tile of q's heads, in pairs of elements.
TILE = 4096


def rope_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    inverse: bool = False,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> None:
    """:func:`rope` in plain torch, on any device; fp64 stays fp64."""
    _check(q, k, cos, sin, v, v_out)
    wide = torch.promote_types(q.dtype, torch.float32)
    rot = cos.shape[-1]
    c1, c2 = cos.to(wide).unsqueeze(1).chunk(2, dim=-1)
    s1, s2 = sin.to(wide).unsqueeze(1).chunk(2, dim=-1)
    for x, out in ((q, q_out), (k, k_out)):
        x1, x2 = x[..., :rot].to(wide).chunk(2, dim=-1)
        if inverse:
            rotated = torch.cat((x1 * c1 + x2 * s2, x2 * c2 - x1 * s1), dim=-1)
        else:
            rotated = torch.cat((x1 * c1 - x2 * s1, x2 * c2 + x1 * s2), dim=-1)
        out[..., :rot].copy_(rotated)
        out[..., rot:].copy_(x[..., rot:])
    if v is not None and v_out is not None:
        v_out.copy_(v)


@jit
def _head_pointers(p_token, i_part, heads, head_stride, BLOCK_HEADS: tl.constexpr):
    """Starts of this program's heads, ``[BLOCK_HEADS, 1]``, and which of them exist."""
    o_head = i_part * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    return (p_token + o_head.to(tl.int64) * head_stride)[:, None], (o_head < heads)[:, None]


@jit
def _store_rotated(p, m, b_x1, b_x2, b_cos1, b_cos2, b_sin1, b_sin2, o_half, HALF: tl.constexpr, INVERSE: tl.constexpr):
    b_x1 = b_x1.to(tl.float32)
    b_x2 = b_x2.to(tl.float32)
    if INVERSE:
        b_y1 = b_x1 * b_cos1 + b_x2 * b_sin2
        b_y2 = b_x2 * b_cos2 - b_x1 * b_sin1
    else:
        b_y1 = b_x1 * b_cos1 - b_x2 * b_sin1
        b_y2 = b_x2 * b_cos2 + b_x1 * b_sin2
    tl.store(p + o_half, b_y1.to(p.dtype.element_ty), mask=m)
    tl.store(p + HALF + o_half, b_y2.to(p.dtype.element_ty), mask=m)


@jit
def _rope_kernel(
    p_q, p_k, p_v, p_cos, p_sin, p_q_out, p_k_out, p_v_out,
    q_heads, k_heads,
    q_token, q_head, k_token, k_head, v_token, v_head, cos_token, sin_token,
    q_out_token, q_out_head, k_out_token, k_out_head, v_out_token, v_out_head,
    DIM: tl.constexpr, HALF: tl.constexpr,
    INVERSE: tl.constexpr, COPY_REST: tl.constexpr, HAS_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_HALF: tl.constexpr, BLOCK_REST: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    i_token = tl.program_id(0).to(tl.int64)
    i_part = tl.program_id(1)
    p_qs, m_q = _head_pointers(p_q + i_token * q_token, i_part, q_heads, q_head, BLOCK_Q)
    p_ks, m_k = _head_pointers(p_k + i_token * k_token, i_part, k_heads, k_head, BLOCK_K)
    p_qs_out, _ = _head_pointers(p_q_out + i_token * q_out_token, i_part, q_heads, q_out_head, BLOCK_Q)
    p_ks_out, _ = _head_pointers(p_k_out + i_token * k_out_token, i_part, k_heads, k_out_head, BLOCK_K)
    o_half = tl.arange(0, BLOCK_HALF)[None, :]
    m_half = o_half < HALF

    # Every load before the first store: the outputs may be the inputs, so none can be moved up past a store later.
    b_q1 = tl.load(p_qs + o_half, mask=m_q & m_half)
    b_q2 = tl.load(p_qs + HALF + o_half, mask=m_q & m_half)
    b_k1 = tl.load(p_ks + o_half, mask=m_k & m_half)
    b_k2 = tl.load(p_ks + HALF + o_half, mask=m_k & m_half)
    b_cos1 = tl.load(p_cos + i_token * cos_token + o_half, mask=m_half).to(tl.float32)
    b_cos2 = tl.load(p_cos + i_token * cos_token + HALF + o_half, mask=m_half).to(tl.float32)
    b_sin1 = tl.load(p_sin + i_token * sin_token + o_half, mask=m_half).to(tl.float32)
    b_sin2 = tl.load(p_sin + i_token * sin_token + HALF + o_half, mask=m_half).to(tl.float32)
    if HAS_V:
        o_dim = tl.arange(0, BLOCK_DIM)[None, :]
        m_v = m_k & (o_dim < DIM)
        p_vs, _ = _head_pointers(p_v + i_token * v_token, i_part, k_heads, v_head, BLOCK_K)
        b_v = tl.load(p_vs + o_dim, mask=m_v)
    if COPY_REST:
        o_rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
        m_rest = o_rest < DIM
        b_q_rest = tl.load(p_qs + o_rest, mask=m_q & m_rest)
        b_k_rest = tl.load(p_ks + o_rest, mask=m_k & m_rest)

    _store_rotated(p_qs_out, m_q & m_half, b_q1, b_q2, b_cos1, b_cos2, b_sin1, b_sin2, o_half, HALF, INVERSE)
    _store_rotated(p_ks_out, m_k & m_half, b_k1, b_k2, b_cos1, b_cos2, b_sin1, b_sin2, o_half, HALF, INVERSE)
    if COPY_REST:
        tl.store(p_qs_out + o_rest, b_q_rest.to(p_q_out.dtype.element_ty), mask=m_q & m_rest)
        tl.store(p_ks_out + o_rest, b_k_rest.to(p_k_out.dtype.element_ty), mask=m_k & m_rest)
    if HAS_V:
        p_vs_out, _ = _head_pointers(p_v_out + i_token * v_out_token, i_part, k_heads, v_out_head, BLOCK_K)
        tl.store(p_vs_out + o_dim, b_v.to(p_v_out.dtype.element_ty), mask=m_v)


def parts_of(q_heads: int, half: int) -> int:
    """Programs that share a token, so that no tile of q's heads is larger than ``TILE`` pairs."""
    return max(1, next_power_of_2(q_heads) * next_power_of_2(half) // TILE)


def tile_of(q_heads: int, k_heads: int, dim: int, rot: int) -> dict[str, int]:
    """Sizes of a program's tiles, and its warps."""
    half = rot // 2
    parts = parts_of(q_heads, half)
    block_q = next_power_of_2(-(-q_heads // parts))
    block_k = next_power_of_2(-(-k_heads // parts))
    block_half = next_power_of_2(half)
    return {
        "DIM": dim,
        "HALF": half,
        "BLOCK_Q": block_q,
        "BLOCK_K": block_k,
        "BLOCK_HALF": block_half,
        "BLOCK_REST": next_power_of_2(dim - rot),
        "BLOCK_DIM": next_power_of_2(dim),
        "num_warps": min(8, max(1, block_q * block_half // 512)),
    }


def rope_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    inverse: bool = False,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> None:
    """:func:`rope` in one launch."""
    _check(q, k, cos, sin, v, v_out)
    (tokens, q_heads, dim), k_heads, rot = q.shape, k.shape[1], cos.shape[-1]
    in_place = q_out.data_ptr() == q.data_ptr() and k_out.data_ptr() == k.data_ptr()
    inputs = (*_strides(q), *_strides(k), *_strides(v), cos.stride(0), sin.stride(0))
    outputs = (*_strides(q_out), *_strides(k_out), *_strides(v_out))
    _rope_kernel[(tokens, parts_of(q_heads, rot // 2))](
        *(q, k, v, cos, sin, q_out, k_out, v_out),
        *(q_heads, k_heads),
        *inputs,
        *outputs,
        INVERSE=inverse,
        COPY_REST=rot < dim and not in_place,
        HAS_V=v is not None,
        **tile_of(q_heads, k_heads, dim, rot),
    )


def _strides(x: torch.Tensor | None) -> tuple[int, int]:
    """Elements from token to token and from head to head of ``[tokens, heads, dim]``; none of None."""
    if x is None:
        return 0, 0
    if x.dim() != 3 or x.stride(2) != 1:
        raise ValueError(
            "expected [tokens, heads, dim] with neighbouring elements, "
            f"got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    return x.stride(0), x.stride(1)


def _check(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    v: torch.Tensor | None, v_out: torch.Tensor | None,
) -> None:  # fmt: skip
    """Shapes that the kernel would read past."""
    rot = cos.shape[-1]
    if rot % 2 or rot > q.shape[-1] or cos.shape != (q.shape[0], rot) or sin.shape != cos.shape:
        raise ValueError(
            f"cos and sin need [tokens, rot] with rot even and at most {q.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)} for {q.shape[0]} tokens"
        )
    if cos.stride(1) != 1 or sin.stride(1) != 1:
        raise ValueError("a row of cos and of sin needs neighbouring elements")
    if (v is None) != (v_out is None):
        raise ValueError("v and v_out come together: what is copied, and where to")
    if v is not None and v.shape != k.shape:
        raise ValueError(f"v needs the shape of k, got {tuple(v.shape)} and {tuple(k.shape)}")


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    inverse: bool = False,
    v: torch.Tensor | None = None,
    v_out: torch.Tensor | None = None,
) -> None:
    """Rotates q and k by their positions.

    Args:
        q: ``[tokens, q_heads, dim]``; token and head strides are free, as for all below.
        k: ``[tokens, k_heads, dim]``.
        cos: ``[tokens, rot]`` in any dtype, rot even and at most dim; its row stride is free (0 too).
        sin: likewise.
        q_out: where the rotated q goes; may be ``q`` itself, with its strides, but not overlap it otherwise.
        k_out: where the rotated k goes; likewise.
        inverse: apply the transposed rotation: q and k are then the gradients of a forward's outputs.
        v: ``[tokens, k_heads, dim]``, copied to ``v_out`` unchanged.
        v_out: where v goes.

    Raises:
        ValueError: only one of ``v`` and ``v_out``, or shapes or strides that the op does not take.
    """
    op = rope_triton if use_triton(q) else rope_reference
    op(q, k, cos, sin, q_out=q_out, k_out=k_out, inverse=inverse, v=v, v_out=v_out)
