"""What the launchers of glu compile: the block is the same for every width."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.glu import BLOCK, NUM_WARPS, _glu_bwd_kernel, _glu_fwd_kernel

DTYPES = ("fp16", "bf16", "fp32")


def _case(kernel: Any, step: str, activation: str, dtype: str, flags: dict[str, Any]) -> Any:
    constexprs: dict[str, Any] = {"ACTIVATION": activation, "BLOCK": BLOCK, **flags}
    kinds = {a: f"*{dtype}" if a.startswith("p_") else "i32" for a in kernel.arg_names}
    signature = {a: "constexpr" if a in constexprs else kind for a, kind in kinds.items()}
    return (f"glu_{step}_{activation}_{dtype}", kernel, signature, constexprs, {"num_warps": NUM_WARPS})


CASES = [
    _case(kernel, step, activation, dtype, flags)
    for kernel, step, flags in (
        (_glu_fwd_kernel, "fwd", {}),
        (_glu_bwd_kernel, "bwd", {"HAS_H": False, "p_h": None}),
        (_glu_bwd_kernel, "bwd_h", {"HAS_H": True}),
    )
    for activation in ("silu", "gelu", "gelu_tanh")
    for dtype in DTYPES
]
