"""Unpacking of 4-bit weights, bit for bit that of bitsandbytes: reference and kernel (in the interpreter)."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Params4bit

from nbqlora.kernels.nf4 import TILE, Nf4, dequantize_nf4, dequantize_nf4_reference, dequantize_nf4_triton, launch
from tests.kernels.truth import ALL_DTYPES, DEVICE, KERNEL_DTYPES, Frame, framed, narrow_accesses, normal

RUNS = [(dequantize_nf4_reference, dtype) for dtype in ALL_DTYPES] + [
    (dequantize_nf4_triton, dtype) for dtype in KERNEL_DTYPES
]
runs = pytest.mark.parametrize(("op", "dtype"), RUNS)
nested = pytest.mark.parametrize("nested", [False, True], ids=["once", "twice"])
# Whole blocks a row; blocks that cross rows, with and without words that do; a last block that is not whole.
SHAPES = [(8, 64), (63, 192), (5, 128), (257, 160), (33, 66), (7, 96), (3, 190), (3, 4160), (255, 74)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def quantized(rows: int, cols: int, nested: bool, blocksize: int = 64, seed: int = 0) -> Params4bit:
    """A parameter as a model loaded in 4 bits has it."""
    w = normal(rows, cols, dtype=torch.float32, seed=seed).cpu()
    parameter = Params4bit(
        w, requires_grad=False, quant_type="nf4", blocksize=blocksize, compress_statistics=nested
    )  # fmt: skip
    return parameter.to(DEVICE)


def as_nf4(parameter: Params4bit) -> Nf4:
    """The same weight, as the op takes it."""
    state = parameter.quant_state
    rows, cols = state.shape
    twice = {}
    if state.nested:
        twice = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
        twice["nested_blocksize"] = state.state2.blocksize
    return Nf4(parameter.data.view(-1), state.absmax, state.code, rows, cols, blocksize=state.blocksize, **twice)


def by_bitsandbytes(parameter: Params4bit) -> torch.Tensor:
    """fp32, as one long row: where blocks cross rows, 0.50.2 is wrong on CPUs with AVX-512."""
    state = copy.copy(parameter.quant_state)
    state.shape, state.dtype = torch.Size([1, parameter.quant_state.shape.numel()]), torch.float32
    return functional.dequantize_4bit(parameter.data, state).view(parameter.quant_state.shape)


@runs
@nested
@shapes
def test_equals_bitsandbytes(op, dtype, nested, shape):
    parameter = quantized(*shape, nested)
    assert parameter.quant_state.nested is nested
    out = Frame(shape, dtype)
    assert op(as_nf4(parameter), out.view) is out.view
    assert torch.equal(out.view, by_bitsandbytes(parameter).to(dtype))
    out.assert_untouched_outside()


@nested
def test_equals_bitsandbytes_called_as_usual(nested):
    parameter = quantized(63, 192, nested)
    out = dequantize_nf4(as_nf4(parameter), torch.empty(63, 192, device=DEVICE))
    assert torch.equal(out, functional.dequantize_4bit(parameter.data, parameter.quant_state))


@runs
@pytest.mark.parametrize(("shape", "blocksize"), [((7, 96), 32), ((9, 320), 128), ((3, 250), 32)], ids=str)
def test_other_blocks(op, dtype, shape, blocksize):
    parameter = quantized(*shape, True, blocksize)
    out = op(as_nf4(parameter), torch.full(shape, torch.nan, dtype=dtype, device=DEVICE))
    assert torch.equal(out, by_bitsandbytes(parameter).to(dtype))


@runs
@pytest.mark.parametrize("shape", [(63, 192), (33, 66), (3, 4160)], ids=str)
@pytest.mark.parametrize(
    ("width", "at", "extra_dtype"),
    [(16, 0, torch.float32), (11, 3, None), (48, 16, torch.float16), (5, 4, None), (1, 0, torch.float32)],
    ids=str,
)
def test_columns_beside(op, dtype, shape, width, at, extra_dtype):
    rows, cols = shape
    r = min(16, width - at)
    extra = normal(rows, r, dtype=extra_dtype or dtype)
    parameter = quantized(rows, cols, True)
    out = Frame((rows, cols + width), dtype)
    op(as_nf4(parameter), out.view, extra=framed(extra), extra_at=at)
    assert torch.equal(out.view[:, :cols], by_bitsandbytes(parameter).to(dtype))
    beside = torch.zeros(rows, width, dtype=dtype, device=DEVICE)
    beside[:, at : at + r] = extra
    assert torch.equal(out.view[:, cols:], beside)
    out.assert_untouched_outside()


@runs
def test_columns_beside_without_extra_are_zero(op, dtype):
    parameter = quantized(33, 66, False)
    out = Frame((33, 66 + 7), dtype)
    op(as_nf4(parameter), out.view)
    assert torch.equal(out.view[:, :66], by_bitsandbytes(parameter).to(dtype))
    assert int(out.view[:, 66:].count_nonzero()) == 0
    out.assert_untouched_outside()


@pytest.mark.parametrize("op", [dequantize_nf4_reference, dequantize_nf4_triton])
def test_an_adapter_that_is_trained_leaves_no_graph(op):
    extra = normal(5, 4, dtype=torch.float32).requires_grad_()
    out = op(as_nf4(quantized(5, 64, True)), torch.empty(5, 68, device=DEVICE), extra=extra)
    assert not out.requires_grad and torch.equal(out[:, 64:], extra.detach())


def test_packed_between_words():
    parameter = quantized(5, 128, True)
    moved = torch.empty(parameter.numel() + 1, dtype=torch.uint8, device=DEVICE)
    moved[1:] = parameter.data.view(-1)
    weight = as_nf4(parameter)
    object.__setattr__(weight, "packed", moved[1:])
    out = dequantize_nf4_triton(weight, torch.empty(5, 128, device=DEVICE))
    assert torch.equal(out, by_bitsandbytes(parameter))


@pytest.mark.parametrize("lookup", ["global", "shared"])
@pytest.mark.parametrize(("block", "chunks", "num_warps"), [(256, 2, 4), (128, 16, 4), (512, 1, 4)])
@pytest.mark.parametrize("shape", [(63, 192), (33, 66)], ids=str)
def test_tiles_that_are_timed(lookup, block, chunks, num_warps, shape):
    parameter = quantized(*shape, True)
    tile = {"LOOKUP": lookup, "BLOCK": block, "CHUNKS": chunks, "num_warps": num_warps}
    assert tile.keys() == TILE.keys()
    out = launch(as_nf4(parameter), torch.full(shape, torch.nan, device=DEVICE), None, 0, tile)
    assert torch.equal(out, by_bitsandbytes(parameter))


def test_stores_are_wide():
    found = narrow_accesses("tests.kernels.cases_nf4", "nf4_4096", "nf4_14336")
    assert len(found) == 4
    # A thread's word is loaded as such, next to its neighbour's; the lookups are single.
    assert {access for accesses in found.values() for access in accesses} == {"ld.global.b32", "ld.global.b8"}


def test_what_does_not_fit():
    weight = as_nf4(quantized(5, 64, True))
    out = torch.empty(5, 70)
    with pytest.raises(ValueError, match=r"a weight of 5 x 64 does not fit into \(4, 64\)"):
        dequantize_nf4(weight, torch.empty(4, 64))
    with pytest.raises(ValueError, match=r"a weight of 5 x 64 does not fit into \(5, 62\)"):
        dequantize_nf4(weight, torch.empty(5, 62))
    with pytest.raises(ValueError, match="neighbouring elements"):
        dequantize_nf4(weight, torch.empty(64, 5).t())
    with pytest.raises(ValueError, match=r"\(5, 4\) at 3 is not within 5 x 6 columns beside"):
        dequantize_nf4(weight, out, extra=torch.empty(5, 4), extra_at=3)
    with pytest.raises(ValueError, match=r"\(4, 4\) at 0 is not within"):
        dequantize_nf4(weight, out, extra=torch.empty(4, 4))


def test_tensors_that_are_no_weight():
    once, twice = as_nf4(quantized(5, 64, False)), as_nf4(quantized(5, 64, True))
    with pytest.raises(ValueError, match=re.escape("packed is torch.uint8 (160, 1), not uint8 [160]; absmax")):
        Nf4(once.packed[:, None], once.absmax[:4], once.code, 5, 64)
    with pytest.raises(ValueError, match="n_cols 65 is odd"):
        Nf4(once.packed, once.absmax, once.code, 5, 65)
    with pytest.raises(ValueError, match=r"absmax is torch\.uint8 .*, not torch\.float32"):
        Nf4(twice.packed, twice.absmax, twice.code, 5, 64)
    with pytest.raises(ValueError, match="nested_absmax, nested_code and offset go together"):
        Nf4(twice.packed, twice.absmax, twice.code, 5, 64, nested_absmax=twice.nested_absmax)
    with pytest.raises(ValueError, match="blocks of 48 and 256 are no powers of two from 32"):
        Nf4(once.packed, once.absmax, once.code, 5, 64, blocksize=48)
