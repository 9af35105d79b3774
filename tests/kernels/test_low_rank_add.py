"""low_rank_add: reference and kernel (in the interpreter) against fp64."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.low_rank_add import MAX_RANK, low_rank_add, low_rank_add_reference, low_rank_add_triton
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

RUNS = [(low_rank_add_reference, dtype) for dtype in ALL_DTYPES] + [
    (low_rank_add_triton, dtype) for dtype in KERNEL_DTYPES
]
runs = pytest.mark.parametrize(("op", "dtype"), RUNS)
# Ranks: one; odd; a part of 16 bytes; several times 16 bytes; the most; too high for the kernel.
SHAPES = [(5, 63, 1), (3, 255, 5), (9, 507, 12), (37, 128, 16), (2, 130, 48), (9, 129, 64), (4, 63, MAX_RANK + 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
# How b lies in memory.
LAYOUTS = {"alone": lambda b: b, "wider": framed}


def operands(shape, dtype):
    """y, u, b and a residual."""
    tokens, d, r = shape
    y, residual = normal(tokens, d, dtype=dtype, scale=2), normal(tokens, d, dtype=dtype, seed=1)
    return y, normal(tokens, r, dtype=dtype, seed=2), normal(d, r, dtype=dtype, scale=0.3, seed=3), residual


def formula(y, u, b, residual, alpha):
    """As torch does it, in the dtype of the operands."""
    total = torch.addmm(y, u, b.t())
    return alpha * total if residual is None else torch.add(residual, total, alpha=alpha)


def both(y, u, b, residual, alpha):
    """The eager path and the truth."""
    wide = (None if x is None else x.double() for x in (y, u, b, residual))
    return formula(y, u, b, residual, alpha), formula(*wide, alpha)


@runs
@shapes
@pytest.mark.parametrize(
    ("layout", "alpha", "with_residual"),
    [
        ("alone", 1.0, True),
        ("alone", 1.0, False),
        ("alone", 0.22, True),
        ("wider", 0.22, False),
        ("wider", 1.0, True),
    ],
)
def test_sum(op, dtype, shape, layout, alpha, with_residual):
    y, u, b, residual = operands(shape, dtype)
    past = framed(residual) if with_residual else None
    out = Frame(y.shape, dtype)
    assert op(framed(y), framed(u), LAYOUTS[layout](b), residual=past, alpha=alpha, out=out.view) is out.view
    out.assert_untouched_outside()
    eager, truth = both(y, u, b, past, alpha)
    assert_no_worse(out.view, eager, truth)
    if shape[2] <= MAX_RANK or op is low_rank_add_reference:
        assert_rounded_once(out.view, truth)


@runs
@pytest.mark.parametrize("r", [16, MAX_RANK + 1])
@pytest.mark.parametrize("place", ["y", "residual"])
def test_in_place(op, dtype, r, place):
    y, u, b, residual = operands((37, 255, r), dtype)
    expected = op(y, u, b, residual=residual, alpha=0.5)
    frames = {"y": Frame(y.shape, dtype), "residual": Frame(y.shape, dtype)}
    mine = {"y": frames["y"].holding(y), "residual": frames["residual"].holding(residual)}
    op(mine["y"], u, b, residual=mine["residual"], alpha=0.5, out=mine[place])
    assert torch.equal(mine[place], expected)
    for frame in frames.values():
        frame.assert_untouched_outside()
    op(mine["y"], u, b, out=mine["y"])
    frames["y"].assert_untouched_outside()


@runs
def test_u_behind_y(op, dtype):
    """As a product leaves them that finds both at once."""
    y, u, b, residual = operands((11, 200, 8), dtype)
    beside = torch.cat((y, u), dim=1)
    op(beside[:, :200], beside[:, 200:], b, residual=residual, out=beside[:, :200])
    assert torch.equal(beside[:, :200], op(y, u, b, residual=residual))
    assert torch.equal(beside[:, 200:], u)


@runs
def test_a_residual_in_another_dtype(op, dtype):
    y, u, b, _ = operands((9, 63, 8), dtype)
    residual = normal(9, 63, dtype=torch.float32, scale=100, seed=4)
    out = op(y, u, b, residual=residual, out=torch.full_like(residual, torch.nan))
    truth = formula(y.double(), u.double(), b.double(), residual.double(), 1.0)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-5)


def test_the_op_chooses_by_the_tensor():
    y, u, b, residual = operands((4, 63, 8), torch.float16)
    op = low_rank_add_triton if y.is_cuda else low_rank_add_reference
    found = low_rank_add(y, u, b, residual=residual, alpha=0.3)
    assert found.dtype == torch.float16 and torch.equal(found, op(y, u, b, residual=residual, alpha=0.3))


@pytest.mark.parametrize("op", [low_rank_add_reference, low_rank_add_triton])
def test_messages(op):
    y, u, b, residual = operands((4, 63, 8), torch.float32)
    fits = r"do not fit together: \(4, 63\), \(4, 8\), "
    with pytest.raises(ValueError, match=fits + r"\(8, 63\), \(4, 63\)"):
        op(y, u, b.t().contiguous())
    with pytest.raises(ValueError, match=fits + r"\(63, 8\), \(3, 63\), \(4, 63\)"):
        op(y, u, b, residual=residual[:3])
    with pytest.raises(ValueError, match=fits + r"\(63, 8\), \(4, 62\)"):
        op(y, u, b, out=torch.empty(4, 62, device=DEVICE))
    with pytest.raises(ValueError, match=r"do not fit together: \(4, 63\), \(3, 8\)"):
        op(y, u[:3], b)
    with pytest.raises(ValueError, match=r"neighbouring elements, got shape \(4, 63\), strides \(1, 4\)"):
        op(y.t().contiguous().t(), u, b)
    with pytest.raises(ValueError, match=r"neighbouring elements, got shape \(63, 8\), strides \(1, 63\)"):
        op(y, u, b.t().contiguous().t())


def test_accesses_are_16_bytes_wide():
    found = narrow_accesses("tests.kernels.cases_low_rank_add", "low_rank_add_")
    assert {"low_rank_add_16_bf16", "low_rank_add_64_bf16", "low_rank_add_32_alone_scaled_bf16"} <= set(found)
    for name, accesses in found.items():
        # A few numbers of u; and rows of b that are no multiple of 16 bytes.
        others = {"ld.global.b16", "ld.global.b32"} | ({"ld.global.v2.b32"} if "_12_" in name else set())
        assert set(accesses) <= others, name
