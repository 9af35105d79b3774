"""The compiled kernel on activations of a model, and its mask where an index leaves 32 bits."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.dropout import dropout_triton
from tests.kernels.test_dropout import assert_share, kept, seed_of
from tests.kernels.truth import Frame, framed, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@dtypes
@pytest.mark.parametrize("shape", [(4096, 4096), (1023, 14336), (257, 507)], ids=str)
@pytest.mark.parametrize("p", [0.05, 0.5])
def test_values_and_mask(dtype, shape, p):
    x, out, seed = normal(*shape, dtype=dtype), Frame(shape, dtype), seed_of(3)
    given = framed(x)
    mode = torch.cuda.get_sync_debug_mode()
    dropout_triton(given, seed, p, out.view)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dropout_triton(given, seed, p, out.view)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    out.assert_untouched_outside()
    mask = kept(dropout_triton, 3, p, shape)
    assert_share(mask, 1 - p)
    assert torch.equal(out.view, torch.where(mask.bool(), (x.float() * (1 / (1 - p))).to(dtype), 0))
    for other in (4, 3 + (1 << 32)):
        assert_share(mask * kept(dropout_triton, other, p, shape), (1 - p) ** 2)


def test_mask_is_that_of_the_interpreter():
    # Columns 0 to 7 of rows 0 to 2, seed 3, p 0.5, as the interpreter gives them.
    expected = ["10110100", "11110110", "01001010"]
    mask = kept(dropout_triton, 3, 0.5, (3, 8)).int().tolist()
    assert ["".join(map(str, row)) for row in mask] == expected


def test_rows_beyond_two_billion_elements():
    rows, n, p = 2**31 // 14336 + 9, 14336, 0.5
    x = torch.ones(rows, n, dtype=torch.float16, device="cuda")
    dropout_triton(x, seed_of(1), p, x)
    for part in (x[:8], x[-8:]):
        assert part.unique().tolist() == [0.0, 2.0]
        assert_share((part != 0).double(), 1 - p)
    assert_share(((x[-8:] != 0) & (x[:8] != 0)).double(), (1 - p) ** 2)
