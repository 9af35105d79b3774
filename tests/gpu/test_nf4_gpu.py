"""The compiled kernel on a model's weights, bit for bit bitsandbytes' own."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes import functional

from nbqlora.kernels.nf4 import dequantize_nf4_triton
from tests.kernels.test_nf4 import as_nf4, by_bitsandbytes, nested, quantized
from tests.kernels.truth import Frame, framed, normal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)


@dtypes
@nested
@pytest.mark.parametrize(
    "shape", [(14336, 4096), (4096, 14336), (1024, 4096), (576, 1536), (1001, 1504), (255, 74)], ids=str
)
def test_equals_bitsandbytes(dtype, nested, shape):
    parameter = quantized(*shape, nested)
    out = Frame(shape, dtype)
    dequantize_nf4_triton(as_nf4(parameter), out.view)
    out.assert_untouched_outside()
    assert torch.equal(out.view, by_bitsandbytes(parameter).to(dtype))
    state = parameter.quant_state
    state.dtype = dtype
    assert torch.equal(out.view, functional.dequantize_4bit(parameter.data, state))


@dtypes
@pytest.mark.parametrize(("width", "at", "r"), [(16, 0, 16), (48, 16, 16), (64, 0, 64), (24, 5, 8), (7, 0, 0)])
def test_columns_beside(dtype, width, at, r):
    rows, cols = 4096, 4096
    parameter = quantized(rows, cols, True)
    extra = normal(rows, r, dtype=torch.float32)
    out = Frame((rows, cols + width), dtype)
    dequantize_nf4_triton(as_nf4(parameter), out.view, extra=framed(extra), extra_at=at)
    out.assert_untouched_outside()
    assert torch.equal(out.view[:, :cols], by_bitsandbytes(parameter).to(dtype))
    beside = torch.zeros(rows, width, dtype=dtype, device="cuda")
    beside[:, at : at + r] = extra
    assert torch.equal(out.view[:, cols:], beside)


def test_nothing_waits_and_nothing_is_allocated():
    weight = as_nf4(quantized(1024, 4096, True))
    out, extra = torch.empty(1024, 4112, dtype=torch.float16, device="cuda"), normal(1024, 16, dtype=torch.float32)
    dequantize_nf4_triton(weight, out, extra=extra)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        dequantize_nf4_triton(weight, out, extra=extra)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    assert torch.cuda.max_memory_allocated() == before
