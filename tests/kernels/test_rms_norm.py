"""rms_norm and its backward: reference and kernel (in the interpreter) against fp64."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.rms_norm import (
    rms_norm,
    rms_norm_backward,
    rms_norm_backward_reference,
    rms_norm_backward_triton,
    rms_norm_reference,
    rms_norm_triton,
)
from tests.kernels.truth import (
    ALL_DTYPES,
    DEVICE,
    KERNEL_DTYPES,
    Frame,
    assert_no_worse,
    assert_rounded_once,
    framed,
    narrow_accesses,
    normal,
)

EPS = 1e-5
STYLES = ["llama", "gemma", "fp32"]
SHAPES = [(5, 63), (3, 255), (7, 507), (2, 1024), (33, 64), (3, 5, 128), (9, 3, 96)]
RUNS = [(rms_norm_reference, rms_norm_backward_reference, dtype) for dtype in ALL_DTYPES] + [
    (rms_norm_triton, rms_norm_backward_triton, dtype) for dtype in KERNEL_DTYPES
]
runs = pytest.mark.parametrize(("forward", "backward", "dtype"), RUNS)


def formula(s, weight, style):
    """As the models write it, in the dtype of ``s``; fp64 has no rounding to speak of."""
    wide = s.to(torch.promote_types(s.dtype, torch.float32))
    weight = weight.double() if s.dtype == torch.float64 else weight
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
    if style == "llama":
        y = weight * normed.to(s.dtype)
    elif style == "gemma":
        y = normed * (1.0 + weight.to(wide.dtype))
    else:
        y = weight * normed
    return y.to(s.dtype)


def both(dtype, make):
    """``make`` of the eager path in ``dtype`` and of the truth."""
    return make(dtype), make(torch.float64)


@runs
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(forward, backward, dtype, style, shape):
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype, seed=1)
    eager, truth = both(dtype, lambda kind: formula(x.to(kind), weight, style))
    out = Frame(shape, dtype, gap=3)
    y, rstd = forward(framed(x, gap=2), weight, EPS, style=style, out=out.view)
    assert y is out.view
    out.assert_untouched_outside()
    assert_no_worse(y, eager, truth)
    assert rstd.dtype == torch.float32 and rstd.is_contiguous()
    true_rstd = torch.rsqrt(x.double().pow(2).mean(-1) + EPS).flatten()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-6, atol=0)


@runs
@pytest.mark.parametrize("style", STYLES)
def test_rounds_where_the_model_does(forward, backward, dtype, style):
    """Bit for bit as eager but for sums in another order; rounding at another place changes a fifth of the values."""
    x, weight = normal(16, 255, dtype=dtype, scale=3), normal(255, dtype=dtype, seed=1)
    y, _ = forward(x, weight, EPS, style=style)
    same = (y == formula(x, weight, style)).float().mean()
    assert dtype == torch.float32 or float(same) > 0.99


@runs
@pytest.mark.parametrize("style", STYLES)
def test_weight_in_fp32(forward, backward, dtype, style):
    x, weight = normal(4, 255, dtype=dtype), normal(255, dtype=torch.float32, seed=1)
    eager, truth = both(dtype, lambda kind: formula(x.to(kind), weight, style))
    y, rstd = forward(x, weight, EPS, style=style)
    assert_no_worse(y, eager, truth)
    dy = normal(4, 255, dtype=dtype, seed=2)
    eager, truth = both(dtype, lambda kind: gradient(x, weight, dy, None, style, kind))
    assert_no_worse(backward(dy, x, weight, rstd, style=style), eager, truth)


@runs
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("alpha", [1.0, 0.22])
@pytest.mark.parametrize("shape", [(5, 63), (3, 1024)])
def test_sum_with_a_residual(forward, backward, dtype, style, alpha, shape):
    x, residual = normal(*shape, dtype=dtype, scale=2), normal(*shape, dtype=dtype, seed=1)
    weight = normal(shape[-1], dtype=dtype, seed=2)
    eager_sum, true_sum = both(dtype, lambda kind: residual.to(kind) + x.to(kind) * alpha)
    out, total = Frame(shape, dtype), Frame(shape, dtype)
    y, _ = forward(
        framed(x), weight, EPS, style=style, out=out.view, sum_with=framed(residual), sum_out=total.view, alpha=alpha
    )
    total.assert_untouched_outside()
    out.assert_untouched_outside()
    assert_no_worse(total.view, eager_sum, true_sum)
    assert_rounded_once(total.view, true_sum)
    # The norm is of the rounded sum, as in the model: held against that sum, not against one that was never stored.
    eager, truth = both(dtype, lambda kind: formula(total.view.to(kind), weight, style))
    assert_no_worse(y, eager, truth)


@runs
@pytest.mark.parametrize("place", ["residual", "x"])
def test_sum_in_place(forward, backward, dtype, place):
    x, residual = normal(5, 255, dtype=dtype), normal(5, 255, dtype=dtype, seed=1)
    weight = normal(255, dtype=dtype, seed=2)
    total = torch.empty_like(x)
    y, _ = forward(x, weight, EPS, sum_with=residual, sum_out=total)
    mine = {"x": x.clone(), "residual": residual.clone()}
    y_in_place, _ = forward(mine["x"], weight, EPS, sum_with=mine["residual"], sum_out=mine[place])
    assert torch.equal(mine[place], total)
    assert torch.equal(y_in_place, y)


def gradient(s, weight, dy, residual_grad, style, dtype):
    """By autograd, of a sum that goes on past the norm where ``residual_grad`` is given."""
    s = s.to(dtype).detach().requires_grad_()
    outputs, grads = [formula(s, weight, style)], [dy.to(dtype)]
    if residual_grad is not None:
        outputs, grads = [*outputs, s * 1], [*grads, residual_grad.to(dtype)]
    return torch.autograd.grad(outputs, s, grads)[0]


@runs
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(forward, backward, dtype, style, with_residual, shape):
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype, seed=1)
    dy = normal(*shape, dtype=dtype, seed=2)
    residual_grad = normal(*shape, dtype=dtype, seed=3) if with_residual else None
    eager, truth = both(dtype, lambda kind: gradient(x, weight, dy, residual_grad, style, kind))
    _, rstd = forward(x, weight, EPS, style=style)
    out = Frame(shape, dtype, gap=1)
    past = None if residual_grad is None else framed(residual_grad, gap=4)
    dx = backward(framed(dy, gap=2), framed(x, gap=3), weight, rstd, style=style, residual_grad=past, out=out.view)
    assert dx is out.view
    out.assert_untouched_outside()
    assert_no_worse(dx, eager, truth)
    assert_rounded_once(dx, truth)


@runs
@pytest.mark.parametrize("place", ["dy", "residual_grad"])
def test_backward_in_place(forward, backward, dtype, place):
    x, weight = normal(9, 3, 96, dtype=dtype), normal(96, dtype=dtype, seed=1)
    grads = {"dy": normal(9, 3, 96, dtype=dtype, seed=2), "residual_grad": normal(9, 3, 96, dtype=dtype, seed=3)}
    _, rstd = forward(x, weight, EPS)
    expected = backward(grads["dy"], x, weight, rstd, residual_grad=grads["residual_grad"])
    mine = {name: framed(grad, gap=2) for name, grad in grads.items()}
    backward(mine["dy"], x, weight, rstd, residual_grad=mine["residual_grad"], out=mine[place])
    assert torch.equal(mine[place], expected)


@runs
@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_with_the_norm_again(forward, backward, dtype, style, with_residual, shape):
    """Bit for bit what the forward wrote, with its factors and without."""
    x, weight = normal(*shape, dtype=dtype, scale=3), normal(shape[-1], dtype=dtype, seed=1)
    dy = normal(*shape, dtype=dtype, seed=2)
    residual_grad = normal(*shape, dtype=dtype, seed=3) if with_residual else None
    eager, truth = both(dtype, lambda kind: gradient(x, weight, dy, residual_grad, style, kind))
    past = None if residual_grad is None else framed(residual_grad, gap=4)
    inputs, y = (framed(dy, gap=2), framed(x, gap=3), weight), Frame(shape, dtype, gap=2)
    _, rstd = forward(inputs[1], weight, EPS, style=style, out=y.view)
    for given in ({"rstd": rstd}, {"eps": EPS}):
        dx, again = Frame(shape, dtype, gap=1), Frame(shape, dtype, gap=2)
        backward(*inputs, **given, style=style, residual_grad=past, out=dx.view, y_out=again.view)
        dx.assert_untouched_outside()
        again.assert_untouched_outside()
        assert_no_worse(dx.view, eager, truth)
        assert torch.equal(again.view, y.view)


@runs
@pytest.mark.parametrize("shape", [(3, 1024), (9, 3, 96)])
@pytest.mark.parametrize("places", [("dy", "x"), ("x", "residual_grad"), ("residual_grad", "dy")], ids=str)
def test_backward_with_the_norm_again_in_place(forward, backward, dtype, shape, places):
    given = {name: normal(*shape, dtype=dtype, seed=seed) for seed, name in enumerate(("dy", "x", "residual_grad"))}
    weight = normal(shape[-1], dtype=dtype, seed=4)
    dx, y = torch.empty_like(given["x"]), torch.empty_like(given["x"])
    outputs = {"out": dx, "y_out": y}
    backward(given["dy"], given["x"], weight, eps=EPS, residual_grad=given["residual_grad"], **outputs)
    mine = {name: values.clone() for name, values in given.items()}
    outputs = dict(zip(outputs, (mine[place] for place in places), strict=True))
    backward(mine["dy"], mine["x"], weight, eps=EPS, residual_grad=mine["residual_grad"], **outputs)
    assert torch.equal(mine[places[0]], dx) and torch.equal(mine[places[1]], y)


@runs
def test_strides_of_transposed_heads(forward, backward, dtype):
    """Heads before tokens in memory, as a ``[heads, tokens, d]`` buffer has them."""
    stored = normal(3, 9, 64, dtype=dtype)
    weight = normal(64, dtype=dtype, seed=1)
    y, rstd = forward(stored.transpose(0, 1), weight, EPS)
    expected, expected_rstd = forward(stored.transpose(0, 1).contiguous(), weight, EPS)
    assert torch.equal(y, expected) and torch.equal(rstd, expected_rstd)


@runs
def test_zero_and_large_rows(forward, backward, dtype):
    """A padded row has rstd = 1/sqrt(eps); squares of fp16's largest values need fp32."""
    x = torch.stack((torch.zeros(63), torch.full((63,), 60000.0))).to(DEVICE, dtype)
    weight = torch.ones(63, dtype=dtype, device=DEVICE)
    y, rstd = forward(x, weight, EPS)
    assert torch.equal(y, torch.stack((torch.zeros(63), torch.ones(63))).to(DEVICE, dtype))
    dx = backward(torch.ones_like(x), x, weight, rstd)
    torch.testing.assert_close(dx[0].float(), torch.full((63,), EPS**-0.5, device=DEVICE), rtol=1e-2, atol=0)
    assert float(dx[1].abs().max()) < 1e-7


def test_the_op_chooses_by_the_tensor():
    x, weight, dy = (normal(4, 63, dtype=torch.float16, seed=seed) for seed in range(3))
    forward, backward = (
        (rms_norm_triton, rms_norm_backward_triton) if x.is_cuda else (rms_norm_reference, rms_norm_backward_reference)
    )
    y, rstd = rms_norm(x, weight[0], EPS, style="gemma", sum_with=dy, sum_out=(total := torch.empty_like(x)), alpha=2.0)
    expected, _ = forward(x, weight[0], EPS, style="gemma", sum_with=dy, sum_out=torch.empty_like(x), alpha=2.0)
    assert torch.equal(y, expected)
    dx = rms_norm_backward(dy, total, weight[0], rstd, style="gemma", residual_grad=x)
    assert torch.equal(dx, backward(dy, total, weight[0], rstd, style="gemma", residual_grad=x))
    found = []
    for op in (rms_norm_backward, backward):
        again = torch.empty_like(y)
        found.append((op(dy, total, weight[0], style="gemma", residual_grad=x, eps=EPS, y_out=again), again))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
    assert torch.equal(found[0][1], y)


@pytest.mark.parametrize("op", [rms_norm_reference, rms_norm_triton])
def test_messages(op):
    x, weight = normal(4, 6, 8, dtype=torch.float32), normal(8, dtype=torch.float32)
    with pytest.raises(ValueError, match="sum_with and sum_out come together"):
        op(x[0], weight, EPS, sum_with=x[0])
    with pytest.raises(ValueError, match=r"the shape of x, \[rows, d\]; got \(4, 6, 8\) and \(4, 6, 8\)"):
        op(x, weight, EPS, sum_with=x, sum_out=x)


@pytest.mark.parametrize("op", [rms_norm_backward_reference, rms_norm_backward_triton])
def test_message_of_factors(op):
    x = normal(4, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="rms_norm_backward needs rstd, or eps to make it again"):
        op(x, x, x[0])


def test_message_of_strides():
    x = normal(8, 4, dtype=torch.float32).t()
    with pytest.raises(ValueError, match=r"neighbouring elements, got shape \(4, 8\), strides \(1, 4\)"):
        rms_norm_triton(x, normal(8, dtype=torch.float32), EPS)


def test_accesses_are_16_bytes_wide():
    found = narrow_accesses("tests.kernels.cases_rms_norm", "rms_norm_")
    assert {"rms_norm_fwd_4096_sum_bf16", "rms_norm_bwd_4096_sum_bf16", "rms_norm_again_heads_128_bf16"} <= set(found)
    # rstd is one number a row.
    of_rstd = {"fwd": {"st.global.b32"}, "bwd": {"ld.global.b32"}, "again": set()}
    for name, accesses in found.items():
        assert set(accesses) == of_rstd[name.split("_")[2]], name
