"""A weight of 4-bit numbers unpacked into 16 bits, and what a product wants appended to it, in one pass.

bitsandbytes stores a weight ``[n_rows, n_cols]`` row after row, two elements a byte (the even one in the high half), as
``code[nibble] * absmax[i // 64]`` for flat index i. Doubly quantized, absmax is itself a byte an entry:
``nested_code[absmax[b]] * nested_absmax[b // 256] + offset``; its own routine unpacks those first, into an fp32 tensor
made anew for each product, and then reads them back. Here both steps are one kernel that allocates nothing and writes
wherever the caller's scratch is, so that a product over ``[weight | adapter]`` needs no copy either: it also writes the
columns beside the weight.

It is bound by its writes (2 bytes an element against 0.516 read). A thread takes a 32-bit word of the packed weight and
writes its eight elements as one 16-byte store; the neighbouring thread has the next word, so the accesses of a warp are
contiguous. The code is looked up in memory, since 64 bytes stay in the first cache and a tree of fifteen selects costs
more than the load. The arithmetic is that of bitsandbytes to the bit, so multiply and add are not fused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nbqlora.kernels._launch import jit, next_power_of_2, row_stride, tl, triton, use_triton

# What a program does: CHUNKS times BLOCK units, one a thread. LOOKUP is where the code's 16 entries are read from.
# H100, bf16: 52.9 us for 14336 x 4096 and 5.4 us for 1024 x 4096, 96 and 100 % of a copy of as many bytes (55.0 and 6.5
# us with 128 x 4; bitsandbytes 75.3 and 10.8 us); tests/bench/nf4_variants.py.
TILE: dict[str, Any] = {"LOOKUP": "global", "BLOCK": 512, "CHUNKS": 1, "num_warps": 4}
# Elements that one program writes beside the weight.
BESIDE = 2048


@dataclass(eq=False)
class Nf4:
    """A weight as bitsandbytes stores it: views of its tensors, nothing more.

    Args:
        packed: ``[n_rows * n_cols / 2]`` uint8, a view of the parameter; empty, and set again, where the weight is not
            always there.
        absmax: an entry a block, fp32, or uint8 if quantized again.
        code: ``[16]`` fp32.
        n_rows: outputs of the linear.
        n_cols: its inputs; even, any.
        blocksize: elements an entry of ``absmax`` scales, a power of two.
        nested_absmax: fp32, an entry for ``nested_blocksize`` entries of ``absmax`` (``quant_state.state2.absmax``).
        nested_code: ``[256]`` fp32 (``quant_state.state2.code``).
        offset: 0-d fp32 on the same device.
        nested_blocksize: a power of two.

    Raises:
        ValueError: what is wrong with the tensors, all of it.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    n_rows: int
    n_cols: int
    blocksize: int = 64
    nested_absmax: torch.Tensor | None = None
    nested_code: torch.Tensor | None = None
    offset: torch.Tensor | None = None
    nested_blocksize: int = 256

    def __post_init__(self) -> None:
        n = self.n_rows * self.n_cols
        n_blocks = -(-n // self.blocksize)
        nested = [x is not None for x in (self.nested_absmax, self.nested_code, self.offset)]
        expected = torch.uint8 if any(nested) else torch.float32
        found = {
            f"n_cols {self.n_cols} is odd": self.n_cols % 2 != 0,
            f"packed is {self.packed.dtype} {tuple(self.packed.shape)}, not uint8 [{n // 2}]": (
                self.packed.dtype != torch.uint8 or self.packed.shape not in ((n // 2,), (0,))
            ),
            f"absmax is {self.absmax.dtype} {tuple(self.absmax.shape)}, not {expected} [{n_blocks}]": (
                self.absmax.dtype != expected or self.absmax.shape != (n_blocks,)
            ),
            "nested_absmax, nested_code and offset go together": any(nested) != all(nested),
            f"blocks of {self.blocksize} and {self.nested_blocksize} are no powers of two from 32": any(
                size < 32 or size & (size - 1) for size in (self.blocksize, self.nested_blocksize)
            ),
        }
        if any(found.values()):
            raise ValueError("; ".join(message for message, wrong in found.items() if wrong))


def dequantize_nf4_reference(
    weight: Nf4, out: torch.Tensor, *, extra: torch.Tensor | None = None, extra_at: int = 0
) -> torch.Tensor:
    """:func:`dequantize_nf4` in plain torch, on any device."""
    _check(weight, out, extra, extra_at)
    # Both elements of each of the 256 bytes: half as many lookups as elements.
    pairs = torch.stack([weight.code.repeat_interleave(16), weight.code.repeat(16)], dim=1)
    values = pairs.index_select(0, weight.packed.int()).view(-1)
    absmax = absmax_of(weight)
    whole = values.numel() // weight.blocksize
    values[: whole * weight.blocksize].view(whole, weight.blocksize).mul_(absmax[:whole, None])
    values[whole * weight.blocksize :].mul_(absmax[whole:])
    out[:, : weight.n_cols].copy_(values.view(weight.n_rows, weight.n_cols))
    out[:, weight.n_cols :].zero_()
    if extra is not None:
        start = weight.n_cols + extra_at
        out[:, start : start + extra.shape[1]].copy_(extra.detach())
    return out


def absmax_of(weight: Nf4) -> torch.Tensor:
    """``[blocks]`` fp32."""
    if weight.nested_absmax is None or weight.nested_code is None or weight.offset is None:
        return weight.absmax
    scale = weight.nested_absmax.repeat_interleave(weight.nested_blocksize)[: weight.absmax.numel()]
    return weight.nested_code.index_select(0, weight.absmax.int()).mul_(scale).add_(weight.offset)


@jit
def _code_of(p_code, b_nibble, LOOKUP: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """``code[nibble]``, of ``[BLOCK, UNIT]`` nibbles."""
    if LOOKUP == "global":
        b_value = tl.load(p_code + b_nibble)
    else:
        b_code = tl.load(p_code + tl.arange(0, 16))
        b_flat = tl.gather(b_code, tl.reshape(b_nibble.to(tl.int32), [BLOCK * UNIT]), 0)
        b_value = tl.reshape(b_flat, [BLOCK, UNIT])
    return b_value


@jit
def _beside(
    p_out, p_extra, i_block, n_rows, n_cols, width, out_row, extra_row, extra_at, n_extra,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The columns after the weight: zero, and ``extra``."""
    o_row = (i_block * ROWS + tl.arange(0, ROWS))[:, None]
    o_col = tl.arange(0, WIDTH)[None, :]
    m = (o_row < n_rows) & (o_col < width)
    i_row = o_row.to(tl.int64)
    b_extra = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    if p_extra is not None:
        o_extra = o_col - extra_at
        m_extra = m & (o_extra >= 0) & (o_extra < n_extra)
        b_extra = tl.load(p_extra + i_row * extra_row + o_extra, mask=m_extra, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * out_row + n_cols + o_col, b_extra.to(p_out.dtype.element_ty), mask=m)


@jit
def _weight(
    p_packed, p_absmax, p_code, p_nested_absmax, p_nested_code, p_offset, p_out, i_block, n_units, row_units, out_row,
    UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, WRAPS_ONCE: tl.constexpr,
    LOOKUP: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """CHUNKS * BLOCK units of UNIT elements each, from wherever in a row the first one is."""
    # So many units share an entry of the second quantization; a program has one such entry.
    group: tl.constexpr = BLOCKSIZE * NESTED_BLOCKSIZE // UNIT
    tl.static_assert(group % (BLOCK * CHUNKS) == 0)
    o_start = i_block * (BLOCK * CHUNKS)
    i_first = o_start // row_units
    o_j = tl.arange(0, UNIT)
    if p_nested_absmax is not None:
        b_step = tl.load(p_nested_absmax + o_start // group)
        b_offset = tl.load(p_offset)
    for i in tl.static_range(CHUNKS):
        o_in = i * BLOCK + tl.arange(0, BLOCK)
        o_unit = o_start + o_in
        m = o_unit < n_units
        b_unit = tl.load(p_packed + o_unit, mask=m, other=0).to(tl.uint32)
        b_absmax = tl.load(p_absmax + o_unit // (BLOCKSIZE // UNIT), mask=m, other=0)
        if p_nested_absmax is not None:
            b_absmax = tl.load(p_nested_code + b_absmax.to(tl.int32)) * b_step + b_offset
        # The even element is in the high half of its byte, and the lowest byte comes first.
        b_nibble = (b_unit[:, None] >> ((o_j ^ 1) * 4)[None, :]) & 15
        b_value = _code_of(p_code, b_nibble, LOOKUP, BLOCK, UNIT) * b_absmax[:, None]
        o_col = o_start - i_first * row_units + o_in
        # A division a unit only where rows are shorter than what a program does.
        i_down = (o_col >= row_units).to(tl.int32) if WRAPS_ONCE else o_col // row_units
        o_out = (i_first + i_down).to(tl.int64) * out_row + (o_col - i_down * row_units) * UNIT
        tl.store(p_out + o_out[:, None] + o_j[None, :], b_value.to(p_out.dtype.element_ty), mask=m[:, None])


@jit
def _nf4_fwd_kernel(
    p_packed, p_absmax, p_code, p_nested_absmax, p_nested_code, p_offset, p_extra, p_out,
    n_rows, n_cols, width, n_units, row_units, out_row, extra_row, extra_at, n_extra,
    UNIT: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, WRAPS_ONCE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
    LOOKUP: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # The few programs for the columns beside the weight are first, so that none of them is the last to end.
    i_program = tl.program_id(0)
    n_beside = 0
    if WIDTH > 0:
        n_beside = tl.cdiv(n_rows, ROWS)
        if i_program < n_beside:
            _beside(
                p_out, p_extra, i_program, n_rows, n_cols, width, out_row, extra_row, extra_at, n_extra, ROWS, WIDTH
            )
    if i_program >= n_beside:
        _weight(
            p_packed, p_absmax, p_code, p_nested_absmax, p_nested_code, p_offset, p_out,
            i_program - n_beside, n_units, row_units, out_row,
            UNIT, BLOCKSIZE, NESTED_BLOCKSIZE, WRAPS_ONCE, LOOKUP, BLOCK, CHUNKS,
        )  # fmt: skip


def dequantize_nf4_triton(
    weight: Nf4, out: torch.Tensor, *, extra: torch.Tensor | None = None, extra_at: int = 0
) -> torch.Tensor:
    """:func:`dequantize_nf4` in one launch."""
    _check(weight, out, extra, extra_at)
    return launch(weight, out, extra, extra_at, TILE)


def launch(
    weight: Nf4, out: torch.Tensor, extra: torch.Tensor | None, extra_at: int, tile: dict[str, Any]
) -> torch.Tensor:
    """The kernel with a tile of one's choice, arguments unchecked."""
    # Bytes are read one by one where a word would cross the end of a row, or begin between two words of memory.
    by_word = weight.n_cols % 8 == 0 and weight.packed.storage_offset() % 4 == 0
    packed = weight.packed.view(torch.int32) if by_word else weight.packed
    n_units, unit, width = packed.numel(), 8 if by_word else 2, out.shape[1] - weight.n_cols
    constexprs = constexprs_of(unit, weight.n_cols // unit, width, tile)
    programs = triton.cdiv(n_units, tile["BLOCK"] * tile["CHUNKS"])
    if constexprs["WIDTH"]:
        programs += triton.cdiv(weight.n_rows, constexprs["ROWS"])
    _nf4_fwd_kernel[(programs,)](
        packed, weight.absmax, weight.code, weight.nested_absmax, weight.nested_code, weight.offset, extra, out,
        weight.n_rows, weight.n_cols, width, n_units, weight.n_cols // unit,
        row_stride(out), 0 if extra is None else row_stride(extra), extra_at, 0 if extra is None else extra.shape[1],
        BLOCKSIZE=weight.blocksize, NESTED_BLOCKSIZE=weight.nested_blocksize, enable_fp_fusion=False,
        **constexprs, **tile,
    )  # fmt: skip
    return out


def constexprs_of(unit: int, row_units: int, width: int, tile: dict[str, Any]) -> dict[str, Any]:
    """What the kernel is compiled for, beyond its tile and the sizes of blocks."""
    columns = next_power_of_2(width) if width else 0
    return {
        "UNIT": unit,
        "WRAPS_ONCE": row_units >= tile["BLOCK"] * tile["CHUNKS"],
        "WIDTH": columns,
        "ROWS": max(1, BESIDE // columns) if width else 1,
    }


def _check(weight: Nf4, out: torch.Tensor, extra: torch.Tensor | None, extra_at: int) -> None:
    row_stride(out)
    width = out.shape[1] - weight.n_cols
    if out.shape[0] != weight.n_rows or width < 0:
        raise ValueError(f"a weight of {weight.n_rows} x {weight.n_cols} does not fit into {tuple(out.shape)}")
    if extra is not None:
        row_stride(extra)
        if extra.shape[0] != weight.n_rows or not 0 <= extra_at <= width - extra.shape[1]:
            raise ValueError(
                f"{tuple(extra.shape)} at {extra_at} is not within {weight.n_rows} x {width} columns beside"
            )


def dequantize_nf4(
    weight: Nf4, out: torch.Tensor, *, extra: torch.Tensor | None = None, extra_at: int = 0
) -> torch.Tensor:
    """Unpack ``weight`` into the first columns of ``out``, and fill the others.

    Args:
        weight: what to unpack.
        out: ``[n_rows, n_cols + width]`` fp32, fp16 or bf16, any row stride; all of it is written.
        extra: ``[n_rows, r]`` for the columns from ``n_cols + extra_at``, any dtype of those; the others are zero.
        extra_at: where ``extra`` starts, counted from the first column beside the weight.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes that do not fit, or elements of a row that are not neighbours.
    """
    op = dequantize_nf4_triton if use_triton(out) else dequantize_nf4_reference
    return op(weight, out, extra=extra, extra_at=extra_at)
