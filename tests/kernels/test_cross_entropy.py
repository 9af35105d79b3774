"""Cross entropy that overwrites logits by their gradient: reference and kernel (in the interpreter) against fp64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from nbqlora.kernels.cross_entropy import cross_entropy_, cross_entropy_reference_, cross_entropy_triton_
from tests.kernels.truth import ALL_DTYPES, DEVICE, KERNEL_DTYPES, Frame, assert_no_worse, narrow_accesses, normal

RUNS = [(cross_entropy_reference_, dtype) for dtype in ALL_DTYPES] + [
    (cross_entropy_triton_, dtype) for dtype in KERNEL_DTYPES
]
runs = pytest.mark.parametrize(("op", "dtype"), RUNS)
ops = pytest.mark.parametrize("op", [cross_entropy_reference_, cross_entropy_triton_])
# Less than a block, one, and two of which the second is partly filled.
vocabularies = pytest.mark.parametrize("vocab", [1, 63, 255, 507, 4096, 5001])
transforms = pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.5, 6.0)], ids=str)
ROWS = 6
FACTOR = 64 / ROWS


def some_targets(vocab: int, rows: int = ROWS) -> torch.Tensor:
    """Both ends, one ignored, the others anywhere."""
    targets = torch.randint(vocab, (rows,), generator=torch.Generator().manual_seed(vocab))
    targets[0], targets[1], targets[2] = 0, vocab - 1, -100
    return targets.to(DEVICE)


def by_autograd(logits, targets, scale, softcap):
    """Losses and the gradient of FACTOR times their sum, in the dtype of ``logits``."""
    logits = logits.detach().requires_grad_()
    z = logits * scale
    if softcap:
        z = softcap * torch.tanh(z / softcap)
    losses = functional.cross_entropy(z, targets, reduction="none")
    (gradient,) = torch.autograd.grad(losses.sum() * FACTOR, logits)
    return losses.detach(), gradient


@runs
@vocabularies
@transforms
@pytest.mark.parametrize("on_device", [False, True], ids=["number", "tensor"])
def test_losses_and_gradient(op, dtype, vocab, scale, softcap, on_device):
    logits, targets = normal(ROWS, vocab, dtype=dtype, scale=4), some_targets(vocab)
    frame = Frame(logits.shape, dtype)
    losses = torch.full((ROWS, 3), torch.nan, device=DEVICE)
    factor = torch.tensor(FACTOR, device=DEVICE) if on_device else FACTOR
    given = frame.holding(logits)
    found = op(given, targets, factor=factor, scale=scale, softcap=softcap, losses=losses[:, 1])
    assert found.data_ptr() == losses[:, 1].data_ptr()
    assert int(losses.isnan().sum()) == 2 * ROWS
    frame.assert_untouched_outside()
    true_losses, true_gradient = by_autograd(logits.double(), targets, scale, softcap)
    _, eager_gradient = by_autograd(logits, targets, scale, softcap)
    # The losses come in fp32 whatever the logits are in, so eager's best is that of fp32.
    in_fp32, _ = by_autograd(logits.float(), targets, scale, softcap)
    assert_no_worse(found, in_fp32, true_losses)
    assert_no_worse(given, eager_gradient, true_gradient)
    assert found[2] == 0 and int(given[2].count_nonzero()) == 0


@runs
def test_losses_without_gradient(op, dtype):
    logits, targets = normal(ROWS, 507, dtype=dtype, scale=4), some_targets(507)
    untouched = logits.clone()
    alone = op(untouched, targets, factor=FACTOR, with_gradient=False)
    assert torch.equal(untouched, logits)
    assert alone.shape == (ROWS,) and alone.dtype == torch.float32
    assert torch.equal(alone, op(logits, targets, factor=FACTOR))
    assert not torch.equal(untouched, logits)


@ops
@pytest.mark.parametrize("bad", [-1, -101, 507, 1 << 40, -(1 << 40)])
def test_targets_that_are_no_column(op, bad):
    logits, targets = normal(ROWS, 507, dtype=torch.float32), some_targets(507)
    clean = logits.clone()
    expected = op(clean, targets, factor=FACTOR)
    targets[3] = bad
    losses = op(logits, targets, factor=FACTOR)
    others = torch.arange(ROWS, device=DEVICE) != 3
    assert bool(losses[3].isnan()) and bool(logits[3].isnan().all())
    assert torch.equal(losses[others], expected[others]) and torch.equal(logits[others], clean[others])


@runs
@pytest.mark.parametrize("softcap", [0.0, 6.0])
def test_logits_at_the_ends_of_their_range(op, dtype, softcap):
    vocab = 5001
    logits = normal(4, vocab, dtype=dtype)
    logits[0] = 60000
    logits[1] = -60000
    logits[2, ::2], logits[2, 1::2] = -60000, 60000
    # What a mask of the vocabulary leaves: nothing in the first block.
    logits[3, : vocab - 3] = -torch.inf
    targets = torch.tensor([5, 5, 7, vocab - 1], device=DEVICE)
    truth = by_autograd(logits.double(), targets, 1.0, softcap)
    losses = op(logits, targets, factor=FACTOR, softcap=softcap)
    torch.testing.assert_close(losses.double(), truth[0], rtol=1e-5, atol=1e-5)
    if softcap:
        # The slope of a capped infinity is 0 here, and 0 * inf in autograd.
        truth[1].nan_to_num_()
    torch.testing.assert_close(logits.double(), truth[1], rtol=1e-2, atol=1e-5)


@ops
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_show(op, bad):
    logits, targets = normal(ROWS, 5001, dtype=torch.float32), some_targets(5001)
    logits[4, 4500] = bad
    losses = op(logits, targets, factor=FACTOR)
    assert losses.isfinite().tolist() == [row != 4 for row in range(ROWS)]
    assert bool(logits[4].isnan().any()) and not bool(logits[:4].isnan().any())


@ops
def test_rows_that_are_ignored_may_hold_anything(op):
    logits, targets = normal(ROWS, 507, dtype=torch.float32), some_targets(507)
    logits[2] = torch.nan
    losses = op(logits, targets, factor=FACTOR)
    assert losses[2] == 0 and int(logits[2].count_nonzero()) == 0


def test_every_other_target():
    wide = some_targets(63, 2 * ROWS)
    logits = normal(ROWS, 63, dtype=torch.float32)
    copied = logits.clone()
    losses = cross_entropy_triton_(logits, wide[::2], factor=FACTOR)
    assert torch.equal(losses, cross_entropy_triton_(copied, wide[::2].contiguous(), factor=FACTOR))
    assert torch.equal(logits, copied)


def test_accesses_are_wide():
    found = narrow_accesses("tests.kernels.cases_cross_entropy", "cross_entropy")
    assert len(found) == 3
    # Once a row: its target, the logit there, the factor, and the loss on either branch.
    once = {"ld.global.b64", "ld.global.b16", "ld.global.b32", "st.global.b32"}
    for accesses in found.values():
        assert set(accesses) <= once and len(accesses) <= 5


def test_what_does_not_fit():
    logits, targets = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="neighbouring elements"):
        cross_entropy_(torch.zeros(5, 3).t(), targets, factor=1.0)
    with pytest.raises(ValueError, match=r"expected 3 targets in int64, got \(2,\) in torch\.int64"):
        cross_entropy_(logits, targets[:2], factor=1.0)
    with pytest.raises(ValueError, match=r"expected 3 targets in int64, got \(3,\) in torch\.int32"):
        cross_entropy_(logits, targets.int(), factor=1.0)
    with pytest.raises(ValueError, match=r"expected room for 3 losses, got \(4,\)"):
        cross_entropy_(logits, targets, factor=1.0, losses=torch.zeros(4))
