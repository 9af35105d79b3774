"""What the launcher of rope compiles for 32 + 8 heads of 128, for part of a head, and for a half of no power of 2."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.rope import _rope_kernel, tile_of

DTYPES = ("fp16", "bf16", "fp32")
# name -> heads of q and of k, dim, rot, dtype of cos and sin (None: that of q), inverse with v
VARIANTS: dict[str, tuple[int, int, int, int, str | None, bool]] = {
    "128": (32, 8, 128, 128, None, False),
    "128_inverse": (32, 8, 128, 128, None, True),
    "part": (32, 32, 80, 32, "fp32", False),
    "96_inverse": (128, 8, 96, 96, "fp32", True),
}
TENSORS = ("q", "k", "v", "q_out", "k_out", "v_out")


def _case(name: str, dtype: str) -> Any:
    q_heads, k_heads, dim, rot, table, inverse = VARIANTS[name]
    tile = tile_of(q_heads, k_heads, dim, rot)
    options = {"num_warps": tile.pop("num_warps")}
    flags = {"INVERSE": inverse, "COPY_REST": rot < dim, "HAS_V": inverse}
    absent = {} if inverse else {"p_v": None, "p_v_out": None}
    kinds = {f"p_{tensor}": f"*{dtype}" for tensor in TENSORS} | dict.fromkeys(("p_cos", "p_sin"), f"*{table or dtype}")
    constexprs: dict[str, Any] = {**absent, **flags, **tile}
    signature = {a: "constexpr" if a in constexprs else kinds.get(a, "i32") for a in _rope_kernel.arg_names}
    return (f"rope_{name}_{dtype}", _rope_kernel, signature, constexprs, options)


CASES = [_case(name, dtype) for name in VARIANTS for dtype in DTYPES]
