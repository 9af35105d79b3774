"""The compiled rope kernel on models' shapes."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.rope import rope_triton
from tests.kernels.test_rope import formula, gradient, inputs
from tests.kernels.truth import Frame, assert_no_worse, framed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
# tokens, heads of q and of k, dim, rot: llama, qwen2, gemma, phi-2, glm, phi-3, 96 heads
SHAPES = [
    (515, 32, 8, 128, 128), (129, 28, 4, 128, 128), (130, 8, 1, 256, 256), (67, 32, 32, 80, 32),
    (131, 32, 2, 128, 64), (63, 32, 32, 96, 96), (33, 96, 8, 128, 128),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@dtypes
@shapes
@pytest.mark.parametrize("place", ["apart", "in place"])
def test_forward(dtype, shape, place):
    q, k, _, cos, sin = inputs(shape, dtype)
    outs = [Frame(x.shape, dtype, right=8) for x in (q, k)]
    mine = [out.holding(x) for out, x in zip(outs, (q, k), strict=True)] if place == "in place" else [q, k]
    rope_triton(*mine, framed(cos), framed(sin), q_out=outs[0].view, k_out=outs[1].view)
    for x, out in zip((q, k), outs, strict=True):
        out.assert_untouched_outside()
        assert_no_worse(out.view, formula(x, cos, sin), formula(x.double(), cos.double(), sin.double()))


@dtypes
@shapes
def test_gradients_side_by_side(dtype, shape):
    q, k, v, cos, sin = inputs(shape, dtype)
    tokens, q_heads, k_heads, dim, _ = shape
    frame = Frame((tokens, q_heads + 2 * k_heads, dim), dtype, left=0, right=16)
    dq, dk, dv = frame.view.split((q_heads, k_heads, k_heads), dim=1)
    rope_triton(q, k, cos, sin, q_out=dq, k_out=dk, inverse=True, v=v, v_out=dv)
    frame.assert_untouched_outside()
    assert torch.equal(dv, v)
    for x, dx in ((q, dq), (k, dk)):
        assert_no_worse(dx, gradient(x, cos, sin), gradient(x.double(), cos.double(), sin.double()))
