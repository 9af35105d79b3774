"""rope and its transpose: reference and kernel (in the interpreter) against fp64."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.rope import parts_of, rope, rope_reference, rope_triton, tile_of
from tests.kernels.truth import (
    ALL_DTYPES,
    KERNEL_DTYPES,
    Frame,
    assert_no_worse,
    assert_rounded_once,
    framed,
    narrow_accesses,
    normal,
)

RUNS = [(rope_reference, dtype) for dtype in ALL_DTYPES] + [(rope_triton, dtype) for dtype in KERNEL_DTYPES]
runs = pytest.mark.parametrize(("op", "dtype"), RUNS)
# tokens, heads of q and of k, dim, rot
SHAPES = [(5, 4, 2, 64, 64), (3, 7, 1, 80, 32), (7, 3, 3, 48, 48), (2, 5, 5, 96, 80), (3, 1, 1, 6, 2)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def formula(x, cos, sin):
    """As transformers writes it, in the dtype of ``x``."""
    rot = cos.shape[-1]
    cos, sin, turned = cos.to(x.dtype).unsqueeze(1), sin.to(x.dtype).unsqueeze(1), x[..., :rot]
    half = torch.cat((-turned[..., rot // 2 :], turned[..., : rot // 2]), dim=-1)
    return torch.cat((turned * cos + half * sin, x[..., rot:]), dim=-1)


def gradient(g, cos, sin):
    """Of the formula, by autograd, for the outputs' gradient ``g``."""
    x = torch.zeros_like(g).requires_grad_()
    return torch.autograd.grad(formula(x, cos, sin), x, g)[0]


def inputs(shape, dtype):
    """q, k, v, and tables of random angles whose halves differ."""
    tokens, q_heads, k_heads, dim, rot = shape
    heads = (q_heads, k_heads, k_heads)
    q, k, v = (normal(tokens, n, dim, dtype=dtype, seed=seed) for seed, n in enumerate(heads))
    angles = normal(tokens, rot, dtype=torch.float32, scale=3, seed=4)
    return q, k, v, angles.cos().to(dtype), angles.sin().to(dtype)


@runs
@shapes
@pytest.mark.parametrize("inverse", [False, True])
def test_rotation(op, dtype, shape, inverse):
    q, k, _, cos, sin = inputs(shape, dtype)
    make = gradient if inverse else formula
    outs = [Frame(x.shape, dtype, gap=gap) for gap, x in enumerate((q, k))]
    op(framed(q, gap=3), framed(k), framed(cos), framed(sin), q_out=outs[0].view, k_out=outs[1].view, inverse=inverse)
    for x, out in zip((q, k), outs, strict=True):
        out.assert_untouched_outside()
        truth = make(x.double(), cos.double(), sin.double())
        assert_no_worse(out.view, make(x, cos, sin), truth)
        assert_rounded_once(out.view, truth)


@runs
@shapes
@pytest.mark.parametrize("inverse", [False, True])
def test_in_place(op, dtype, shape, inverse):
    q, k, _, cos, sin = inputs(shape, dtype)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    op(q, k, cos, sin, q_out=q_out, k_out=k_out, inverse=inverse)
    frames = [Frame(x.shape, dtype, gap=2) for x in (q, k)]
    q_mine, k_mine = frames[0].holding(q), frames[1].holding(k)
    op(q_mine, k_mine, cos, sin, q_out=q_mine, k_out=k_mine, inverse=inverse)
    for frame, expected in zip(frames, (q_out, k_out), strict=True):
        frame.assert_untouched_outside()
        assert torch.equal(frame.view, expected)


@runs
def test_only_one_in_place(op, dtype):
    """The dims past rot reach k's buffer although q stays where it is."""
    q, k, _, cos, sin = inputs((3, 4, 2, 80, 32), dtype)
    q_before = q.clone()
    k_out = Frame(k.shape, dtype)
    op(q, k, cos, sin, q_out=q, k_out=k_out.view)
    k_out.assert_untouched_outside()
    assert torch.equal(k_out.view[..., 32:], k[..., 32:])
    assert torch.equal(q[..., 32:], q_before[..., 32:])


@runs
@shapes
def test_gradients_side_by_side(op, dtype, shape):
    """dq, dk and dv in one ``[tokens, (hq + 2 hk) * dim + extra]`` buffer."""
    q, k, v, cos, sin = inputs(shape, dtype)
    tokens, q_heads, k_heads, dim, _ = shape
    frame = Frame((tokens, q_heads + 2 * k_heads, dim), dtype, left=0, right=7)
    dq, dk, dv = frame.view.split((q_heads, k_heads, k_heads), dim=1)
    op(framed(q), framed(k), cos, sin, q_out=dq, k_out=dk, inverse=True, v=framed(v, gap=1), v_out=dv)
    frame.assert_untouched_outside()
    assert torch.equal(dv, v)
    for x, dx in ((q, dq), (k, dk)):
        assert_no_worse(dx, gradient(x, cos, sin), gradient(x.double(), cos.double(), sin.double()))


@runs
def test_tables_in_fp32_and_one_row_for_all(op, dtype):
    """cos and sin as fp32 rows with stride 0, which no eager path in half precision would keep so exact."""
    q, k, _, _, _ = inputs((5, 4, 2, 64, 64), dtype)
    angles = normal(1, 64, dtype=torch.float32, seed=9)
    cos, sin = angles.cos().expand(5, 64), angles.sin().expand(5, 64)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    op(q, k, cos, sin, q_out=q_out, k_out=k_out)
    for x, out in ((q, q_out), (k, k_out)):
        assert_no_worse(out, formula(x, cos, sin), formula(x.double(), cos.double(), sin.double()))


@runs
def test_many_heads_are_shared_out(op, dtype):
    """More heads than a tile holds: the last program of a token has fewer of them."""
    shape = (2, 72, 9, 128, 128)
    assert parts_of(72, 64) == 2
    q, k, v, cos, sin = inputs(shape, dtype)
    q_out, k_out, v_out = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    op(q, k, cos, sin, q_out=q_out, k_out=k_out, v=v, v_out=v_out)
    assert torch.equal(v_out, v)
    for x, out in ((q, q_out), (k, k_out)):
        assert_no_worse(out, formula(x, cos, sin), formula(x.double(), cos.double(), sin.double()))


def test_every_head_is_in_a_part():
    models = [(32, 8, 128), (28, 4, 128), (64, 8, 128), (72, 9, 128), (128, 128, 192), (16, 1, 256)]
    for q_heads, k_heads, dim in models:
        tile, parts = tile_of(q_heads, k_heads, dim, dim), parts_of(q_heads, dim // 2)
        assert tile["BLOCK_Q"] * parts >= q_heads and tile["BLOCK_K"] * parts >= k_heads
        assert tile["BLOCK_Q"] * tile["BLOCK_HALF"] <= 4096


def test_the_op_chooses_by_the_tensor():
    q, k, v, cos, sin = inputs((5, 4, 2, 64, 32), torch.float16)
    outs = []
    for op in (rope, rope_triton if q.is_cuda else rope_reference):
        outs.append([torch.empty_like(x) for x in (q, k, v)])
        op(q, k, cos, sin, q_out=outs[-1][0], k_out=outs[-1][1], inverse=True, v=v, v_out=outs[-1][2])
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


@pytest.mark.parametrize("op", [rope_reference, rope_triton])
def test_messages(op):
    q, k, v, cos, sin = inputs((5, 4, 2, 64, 64), torch.float32)

    def call(cos=cos, sin=sin, **more):
        op(q, k, cos, sin, q_out=torch.empty_like(q), k_out=torch.empty_like(k), **more)

    with pytest.raises(ValueError, match=r"rot even and at most 64, got \(5, 63\) and \(5, 63\) for 5 tokens"):
        call(cos[:, :63], sin[:, :63])
    with pytest.raises(ValueError, match=r"got \(1, 64\) and \(1, 64\) for 5 tokens"):
        call(cos[:1], sin[:1])
    with pytest.raises(ValueError, match="a row of cos and of sin needs neighbouring elements"):
        call(cos[:, ::2], sin[:, ::2])
    with pytest.raises(ValueError, match="v and v_out come together"):
        call(v=v)
    with pytest.raises(ValueError, match=r"v needs the shape of k, got \(5, 1, 64\) and \(5, 2, 64\)"):
        call(v=v[:, :1], v_out=v[:, :1])


def test_message_of_strides():
    q, k, _, cos, sin = inputs((5, 4, 2, 64, 64), torch.float32)
    with pytest.raises(ValueError, match=r"neighbouring elements, got shape \(5, 4, 64\), strides \(256, 1, 4\)"):
        rope_triton(q.transpose(1, 2).contiguous().transpose(1, 2), k, cos, sin, q_out=q, k_out=k)


def test_accesses_are_16_bytes_wide():
    found = narrow_accesses("tests.kernels.cases_rope", "rope_128")
    assert set(found) == {"rope_128_bf16", "rope_128_inverse_bf16"}
    for accesses in found.values():
        # 512 pairs of k, and the tables read in their layout, are four elements for each of 128 threads.
        assert len(accesses) == 8 and set(accesses) == {"ld.global.v2.b32", "st.global.v2.b32"}
