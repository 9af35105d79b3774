"""What the launcher of nf4 compiles for doubly quantized weights of 4096 and 14336 columns, and the rarer ways."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.nf4 import TILE, _nf4_fwd_kernel, constexprs_of

DTYPES = ("fp16", "bf16", "fp32")
# name -> columns, columns beside, dtype of what is beside, nested, where the code is looked up
VARIANTS: dict[str, tuple[int, int, str | None, bool, str]] = {
    "4096": (4096, 0, None, True, "global"),
    "4096_lora": (4096, 16, "fp32", True, "global"),
    "14336_zeros": (14336, 48, None, True, "global"),
    "4096_shared": (4096, 0, None, True, "shared"),
    "74_flat": (74, 3, "same", False, "global"),
}
NESTED = ("p_nested_absmax", "p_nested_code", "p_offset")


def _case(name: str, dtype: str) -> Any:
    n_cols, width, extra, nested, lookup = VARIANTS[name]
    tile = {**TILE, "LOOKUP": lookup}
    options = {"num_warps": tile.pop("num_warps"), "enable_fp_fusion": False}
    unit = 8 if n_cols % 8 == 0 else 2
    constexprs = {**constexprs_of(unit, n_cols // unit, width, tile), **tile, "BLOCKSIZE": 64, "NESTED_BLOCKSIZE": 256}
    kinds = {
        "p_packed": "*i32" if unit == 8 else "*u8",
        "p_absmax": "*u8" if nested else "*fp32",
        "p_code": "*fp32",
        **dict.fromkeys(NESTED, "*fp32" if nested else None),
        "p_extra": extra and f"*{dtype if extra == 'same' else extra}",
        "p_out": f"*{dtype}",
    }
    constexprs |= {p: None for p, kind in kinds.items() if kind is None}
    arguments = _nf4_fwd_kernel.arg_names
    signature = {a: "constexpr" if a in constexprs else kinds.get(a, "i32") for a in arguments}
    return (f"nf4_{name}_{dtype}", _nf4_fwd_kernel, signature, constexprs, options)


CASES = [_case(name, dtype) for name in VARIANTS for dtype in DTYPES]
