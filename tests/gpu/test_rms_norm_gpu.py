"""The compiled rms_norm kernels on a model's shapes."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.rms_norm import rms_norm_backward_triton, rms_norm_triton
from tests.kernels.test_rms_norm import EPS, STYLES, formula, gradient
from tests.kernels.truth import Frame, assert_no_worse, framed, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SHAPES = [(515, 4096), (258, 3584), (129, 14336), (65, 16384), (1027, 32, 128), (511, 8, 256), (2049, 4, 64)]


@dtypes
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(dtype, style, shape):
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype, seed=1)
    dy, past = normal(*shape, dtype=dtype, seed=2), normal(*shape, dtype=dtype, seed=3)
    y, dx = Frame(shape, dtype, left=16, right=16), Frame(shape, dtype, left=16, right=16)
    _, rstd = rms_norm_triton(framed(x), weight, EPS, style=style, out=y.view)
    rms_norm_backward_triton(dy, framed(x), weight, rstd, style=style, residual_grad=framed(past), out=dx.view)
    y.assert_untouched_outside()
    dx.assert_untouched_outside()
    assert_no_worse(y.view, formula(x, weight, style), formula(x.double(), weight, style))
    eager, truth = (gradient(x, weight, dy, past, style, kind) for kind in (dtype, torch.float64))
    assert_no_worse(dx.view, eager, truth)


@dtypes
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_backward_with_the_norm_again(dtype, style, shape):
    """Bit for bit what the forward wrote: both compile the same sum."""
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype, seed=1)
    dy, past = normal(*shape, dtype=dtype, seed=2), normal(*shape, dtype=dtype, seed=3)
    y, _ = rms_norm_triton(framed(x), weight, EPS, style=style)
    dx, again = Frame(shape, dtype, left=16, right=16), Frame(shape, dtype, left=16, right=16)
    rms_norm_backward_triton(
        dy, framed(x), weight, style=style, residual_grad=framed(past), out=dx.view, eps=EPS, y_out=again.view
    )
    dx.assert_untouched_outside()
    again.assert_untouched_outside()
    assert torch.equal(again.view, y)
    eager, truth = (gradient(x, weight, dy, past, style, kind) for kind in (dtype, torch.float64))
    assert_no_worse(dx.view, eager, truth)


@dtypes
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_sum_with_a_residual(dtype, weight_dtype, shape):
    x, residual = normal(*shape, dtype=dtype, scale=3), normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[-1], dtype=weight_dtype, seed=2)
    y, total = Frame(shape, dtype), residual.clone()
    rms_norm_triton(x, weight, EPS, style="fp32", out=y.view, sum_with=total, sum_out=total, alpha=0.22)
    y.assert_untouched_outside()
    assert_no_worse(total, residual + x * 0.22, residual.double() + x.double() * 0.22)
    assert_no_worse(y.view, formula(total, weight, "fp32"), formula(total.double(), weight, "fp32"))


def test_rows_past_two_to_the_31_elements():
    """Offsets of the last rows do not fit in 32 bits."""
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB")
    x = torch.empty((1 << 31) // 128 + 5, 128, dtype=torch.float16, device="cuda")
    x[-40:] = normal(40, 128, dtype=torch.float16)
    weight = normal(128, dtype=torch.float16, seed=1)
    y, rstd = rms_norm_triton(x, weight, EPS)
    expected, expected_rstd = rms_norm_triton(x[-40:].clone(), weight, EPS)
    assert torch.equal(y[-40:], expected) and torch.equal(rstd[-40:], expected_rstd)
