"""Dropout by a seed: the same mask for the same seed, and otherwise none that is like another."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.dropout import dropout, dropout_reference, dropout_triton
from tests.kernels.truth import ALL_DTYPES, DEVICE, KERNEL_DTYPES, Frame, framed, narrow_accesses, normal

RUNS = [(dropout_reference, dtype) for dtype in ALL_DTYPES] + [(dropout_triton, dtype) for dtype in KERNEL_DTYPES]
runs = pytest.mark.parametrize(("op", "dtype"), RUNS)
ops = pytest.mark.parametrize("op", [dropout_reference, dropout_triton])
SEEDS = (0, 1, -1, 7 << 32, (1 << 63) - 1, 12345)
# Enough for five standard deviations of a share to be below 2 %.
SHAPE = (24, 2055)


def seed_of(number: int) -> torch.Tensor:
    return torch.tensor(number, device=DEVICE)


def kept(op, number: int, p: float, shape: tuple[int, int] = SHAPE) -> torch.Tensor:
    """The mask, as 0 and 1 in fp64."""
    return (op(torch.ones(shape, device=DEVICE), seed_of(number), p) != 0).double()


def assert_share(mask: torch.Tensor, share: float) -> None:
    """Within five standard deviations."""
    spread = (share * (1 - share) / mask.numel()) ** 0.5
    assert abs(float(mask.mean()) - share) < 5 * spread


@runs
@pytest.mark.parametrize("shape", [(5, 63), (3, 255), (2, 507), (2, 1024), (3, 2055)], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_values(op, dtype, shape, p):
    x, out = normal(*shape, dtype=dtype), Frame(shape, dtype)
    assert op(framed(x), seed_of(3), p, out.view) is out.view
    out.assert_untouched_outside()
    keep = kept(op, 3, p, shape).bool()
    # Rounded once from fp32.
    assert torch.equal(out.view, torch.where(keep, (x.float() * (1 / (1 - p))).to(dtype), 0))
    assert torch.equal(op(x, seed_of(3), p), out.view)


@ops
@pytest.mark.parametrize("p", [0.05, 0.9])
@pytest.mark.parametrize("number", SEEDS)
def test_share_that_is_kept(op, p, number):
    mask = kept(op, number, p)
    assert_share(mask, 1 - p)
    for lane in range(4):
        assert_share(mask[:, lane::4], 1 - p)


@ops
def test_masks_are_independent(op):
    masks = [kept(op, number, 0.5) for number in SEEDS]
    for i, one in enumerate(masks):
        assert_share(one[1:] * one[:-1], 0.25)
        for step in (1, 2, 3, 4, 1024):
            assert_share(one[:, step:] * one[:, :-step], 0.25)
        for other in masks[:i]:
            assert_share(one * other, 0.25)


@runs
def test_backward_is_the_same_call(op, dtype):
    x, seed, p = normal(6, 507, dtype=dtype), seed_of(11), 0.3
    y = op(x, seed, p)
    # Another layout, and gradients in fp32: the mask is of the element's place.
    dy = normal(6, 507, dtype=torch.float32, seed=1)
    dx = op(framed(dy), seed, p)
    through = x.double().requires_grad_()
    masked = through * (y != 0).double() / (1 - p)
    (expected,) = torch.autograd.grad(masked, through, dy.double())
    torch.testing.assert_close(dx.double(), expected, rtol=1e-6, atol=0)


@ops
def test_in_place_and_nothing_dropped(op):
    x = normal(5, 255, dtype=torch.float32)
    expected = op(x, seed_of(1), 0.5)
    assert torch.equal(op(x, seed_of(1), 0.0), x)
    assert op(x, seed_of(1), 0.5, x) is x
    assert torch.equal(x, expected)


@ops
def test_what_is_dropped_is_gone(op):
    x = torch.full((5, 255), torch.inf, device=DEVICE)
    assert set(op(x, seed_of(1), 0.5).unique().tolist()) == {0.0, torch.inf}


def test_accesses_are_wide():
    # Once: the seed.
    assert narrow_accesses("tests.kernels.cases_dropout", "dropout") == {"dropout_bf16": ["ld.global.b64"]}


def test_what_does_not_fit():
    x, seed = torch.zeros(3, 5), torch.tensor(1)
    for p in (1.0, -0.1, torch.nan):
        with pytest.raises(ValueError, match=f"a share of {p} cannot be dropped: it is from 0 to below 1"):
            dropout(x, seed, p)
    with pytest.raises(ValueError, match="neighbouring elements"):
        dropout(x.t(), seed, 0.5)
    with pytest.raises(ValueError, match=r"\(3, 5\) does not fit into \(3, 6\)"):
        dropout(x, seed, 0.5, torch.zeros(3, 6))
