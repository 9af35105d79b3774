"""The compiled kernel on a model's vocabularies."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.cross_entropy import cross_entropy_triton_
from tests.kernels.test_cross_entropy import FACTOR, by_autograd, some_targets
from tests.kernels.truth import Frame, assert_no_worse, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.25, 0.0), (1.5, 6.0)], ids=str)
@pytest.mark.parametrize("vocab", [49152, 128256, 151669, 262144])
def test_losses_and_gradient(dtype, scale, softcap, vocab):
    rows = 65
    logits, targets = normal(rows, vocab, dtype=dtype, scale=4), some_targets(vocab, rows)
    frame, factor = Frame(logits.shape, dtype), torch.tensor(FACTOR, device="cuda")
    given = frame.holding(logits)
    cross_entropy_triton_(given, targets, factor=factor, scale=scale, softcap=softcap)
    given.copy_(logits)
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses = cross_entropy_triton_(given, targets, factor=factor, scale=scale, softcap=softcap)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    frame.assert_untouched_outside()
    true_losses, true_gradient = by_autograd(logits.double(), targets, scale, softcap)
    in_fp32, _ = by_autograd(logits.float(), targets, scale, softcap)
    assert_no_worse(losses, in_fp32, true_losses)
    _, eager_gradient = by_autograd(logits, targets, scale, softcap)
    assert_no_worse(given, eager_gradient, true_gradient)


@dtypes
def test_rows_beyond_two_billion_elements(dtype):
    rows, vocab = 2**31 // 262144 + 3, 262144
    if torch.cuda.get_device_properties(0).total_memory < 3 * rows * vocab * dtype.itemsize:
        pytest.skip("needs a larger card")
    logits = torch.zeros(rows, vocab, dtype=dtype, device="cuda")
    logits[-1] = normal(1, vocab, dtype=dtype)[0]
    alone = logits[-1:].clone()
    targets = torch.full((rows,), 5, device="cuda")
    losses = cross_entropy_triton_(logits, targets, factor=1.0)
    assert torch.equal(losses[-1:], cross_entropy_triton_(alone, targets[-1:], factor=1.0))
    assert torch.equal(logits[-1:], alone)
    torch.testing.assert_close(losses[:-1], torch.full_like(losses[:-1], vocab).log_())


def test_a_target_that_is_no_column():
    logits = normal(3, 128256, dtype=torch.float16)
    targets = torch.tensor([1, 1 << 50, 2], device="cuda")
    losses = cross_entropy_triton_(logits, targets, factor=1.0)
    assert losses.isnan().tolist() == [False, True, False]
    assert logits.isnan().all(dim=1).tolist() == [False, True, False]
