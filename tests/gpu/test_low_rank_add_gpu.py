"""The compiled low_rank_add on a model's shapes."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels.low_rank_add import low_rank_add_triton
from tests.kernels.test_low_rank_add import LAYOUTS, both, operands
from tests.kernels.truth import Frame, assert_no_worse, framed, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
SHAPES = [(515, 4096, 16), (258, 14336, 32), (1001, 1024, 8), (130, 3584, 64), (63, 507, 12), (515, 4096, 128)]


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch):
    """Eager products in fp32 as they are without TF32, whatever another test has set."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("alpha", "with_residual"), [(1.0, True), (0.22, True), (1.0, False)])
def test_sum(dtype, shape, layout, alpha, with_residual):
    y, u, b, residual = operands(shape, dtype)
    past = framed(residual) if with_residual else None
    out = Frame(y.shape, dtype, right=8)
    low_rank_add_triton(framed(y), framed(u), LAYOUTS[layout](b), residual=past, alpha=alpha, out=out.view)
    out.assert_untouched_outside()
    assert_no_worse(out.view, *both(y, u, b, past, alpha))


@dtypes
@pytest.mark.parametrize("place", ["y", "residual"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_in_place_beside_u(dtype, place, layout):
    """As the engine calls it: y and u are columns of one tensor, and the sum takes the place of an operand."""
    y, u, b, residual = operands((2049, 4096, 16), dtype)
    b = LAYOUTS[layout](b)
    beside = torch.cat((y, u), dim=1)
    expected = low_rank_add_triton(beside[:, :4096], beside[:, 4096:], b, residual=residual)
    mine = {"y": beside[:, :4096], "residual": residual}
    low_rank_add_triton(mine["y"], beside[:, 4096:], b, residual=mine["residual"], out=mine[place])
    assert torch.equal(mine[place], expected)
    assert torch.equal(beside[:, 4096:], u)


def test_rows_past_two_to_the_31_elements():
    """Offsets of the last rows do not fit in 32 bits."""
    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB")
    tokens, d = (1 << 31) // 4096 + 40, 4096
    y = torch.zeros(tokens, d, dtype=torch.float16, device="cuda")
    u, b = normal(tokens, 8, dtype=torch.float16), normal(d, 8, dtype=torch.float16, seed=1)
    low_rank_add_triton(y, u, b, out=y)
    expected = low_rank_add_triton(torch.zeros_like(y[-40:]), u[-40:], b)
    assert torch.equal(y[-40:], expected) and float(expected.abs().max()) > 1
