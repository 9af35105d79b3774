"""What the launcher of low_rank_add compiles: the usual ranks and others."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.low_rank_add import _low_rank_add_fwd_kernel, tile_of

DTYPES = ("fp16", "bf16", "fp32")
# name -> rank, with a residual, alpha is not 1
VARIANTS: dict[str, tuple[int, bool, bool]] = {
    "16": (16, True, False),
    "16_alone": (16, False, False),
    "8_scaled": (8, True, True),
    "64": (64, True, False),
    "12": (12, True, False),
    "32_alone_scaled": (32, False, True),
}


def _case(name: str, dtype: str) -> Any:
    r, residual, scaled = VARIANTS[name]
    constexprs: dict[str, Any] = {"R": r, "SCALED": scaled}
    tile = tile_of(r, 4 if dtype == "fp32" else 2)
    options = {"num_warps": tile.pop("num_warps")}
    constexprs |= {**tile, **({} if residual else {"p_residual": None})}
    kinds = {a: f"*{dtype}" if a.startswith("p_") else "i32" for a in _low_rank_add_fwd_kernel.arg_names}
    signature = {a: "constexpr" if a in constexprs else kind for a, kind in (kinds | {"alpha": "fp32"}).items()}
    return (f"low_rank_add_{name}_{dtype}", _low_rank_add_fwd_kernel, signature, constexprs, options)


CASES = [_case(name, dtype) for name in VARIANTS for dtype in DTYPES]
