"""What the launcher of dropout compiles: the same for every width."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.dropout import BLOCK, NUM_WARPS, ROUNDS, _dropout_fwd_kernel

DTYPES = ("fp16", "bf16", "fp32")
KINDS = {"p_seed": "*i64", "p": "fp32", "scale": "fp32", "BLOCK": "constexpr", "ROUNDS": "constexpr"}


def _case(dtype: str) -> Any:
    kinds = KINDS | dict.fromkeys(("p_x", "p_out"), f"*{dtype}")
    signature = {a: kinds.get(a, "i32") for a in _dropout_fwd_kernel.arg_names}
    return (
        f"dropout_{dtype}",
        _dropout_fwd_kernel,
        signature,
        {"BLOCK": BLOCK, "ROUNDS": ROUNDS},
        {"num_warps": NUM_WARPS},
    )


CASES = [_case(dtype) for dtype in DTYPES]
