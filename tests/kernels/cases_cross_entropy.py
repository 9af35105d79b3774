"""What the launcher of cross_entropy compiles for 128256 entries, and for 262144 with a cap."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.cross_entropy import _cross_entropy_fwd_kernel, tile_of

DTYPES = ("fp16", "bf16", "fp32")
# name -> entries, cap, gradient, factor on the device
VARIANTS: dict[str, tuple[int, bool, bool, bool]] = {
    "128256": (128256, False, True, True),
    "262144_cap": (262144, True, True, False),
    "128256_loss": (128256, False, False, False),
}


def _case(name: str, dtype: str) -> Any:
    vocab, has_cap, with_gradient, on_device = VARIANTS[name]
    tile = tile_of(vocab)
    options = {"num_warps": tile.pop("num_warps")}
    constexprs: dict[str, Any] = {"HAS_CAP": has_cap, "WITH_GRADIENT": with_gradient, **tile}
    if not on_device:
        constexprs["p_factor"] = None
    kinds = {"p_logits": f"*{dtype}", "p_targets": "*i64", "p_losses": "*fp32", "p_factor": "*fp32"}
    kinds |= dict.fromkeys(("factor", "scale", "softcap"), "fp32")
    arguments = _cross_entropy_fwd_kernel.arg_names
    signature = {a: "constexpr" if a in constexprs else kinds.get(a, "i32") for a in arguments}
    return (f"cross_entropy_{name}_{dtype}", _cross_entropy_fwd_kernel, signature, constexprs, options)


CASES = [_case(name, dtype) for name in VARIANTS for dtype in DTYPES]
