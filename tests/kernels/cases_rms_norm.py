"""What the launchers of rms_norm compile for a model 4096 or 14336 wide, and for heads of 128."""

from __future__ import annotations

from typing import Any

from nbqlora.kernels.rms_norm import _rms_norm_bwd_kernel, _rms_norm_fwd_kernel, tile_of

DTYPES = ("fp16", "bf16", "fp32")
# name -> width, dtype of the weight (None: that of x), style, fused residual
VARIANTS: dict[str, tuple[int, str | None, str, bool]] = {
    "4096": (4096, None, "llama", False),
    "4096_sum": (4096, None, "llama", True),
    "4096_gemma": (4096, "fp32", "gemma", True),
    "14336_sum": (14336, "fp32", "fp32", True),
    "heads_128": (128, None, "llama", False),
    "heads_256": (256, "fp32", "gemma", False),
}


def _case(
    name: str, kernel: Any, pointers: dict[str, str | None], numbers: dict[str, str], flags: dict[str, Any]
) -> Any:
    """Absent tensors are constants, as a launch makes them."""
    tile = dict(flags)
    options = {"num_warps": tile.pop("num_warps")}
    constexprs = {**{p: None for p, kind in pointers.items() if kind is None}, **tile}
    signature = {p: f"*{kind}" for p, kind in pointers.items() if kind is not None} | numbers
    order = [argument for argument in kernel.arg_names if argument in signature or argument in constexprs]
    return (name, kernel, {a: signature.get(a, "constexpr") for a in order}, constexprs, options)


def _forward(name: str, dtype: str) -> Any:
    width, weight, style, fused = VARIANTS[name]
    added = dtype if fused else None
    pointers = {"p_x": dtype, "p_weight": weight or dtype, "p_y": dtype, "p_rstd": "fp32"}
    strides = ("x_token", "x_head", "y_token", "y_head", "sum_with_row", "sum_out_row")
    return _case(
        f"rms_norm_fwd_{name}_{dtype}",
        _rms_norm_fwd_kernel,
        {**pointers, "p_sum_with": added, "p_sum_out": added},
        dict.fromkeys(("n_rows", "heads", "d", *strides), "i32") | {"eps": "fp32", "alpha": "fp32"},
        {"ROUND_NORMED": style == "llama", "ONE_PLUS_WEIGHT": style == "gemma", "HAS_SUM": fused, **tile_of(width)},
    )


def _backward(name: str, dtype: str, again: bool = False) -> Any:
    """``again``: the factors are made again, and the norm is written too."""
    width, weight, style, fused = VARIANTS[name]
    pointers = {"p_dy": dtype, "p_x": dtype, "p_weight": weight or dtype, "p_rstd": None if again else "fp32"}
    tensors = ("dy", "x", "residual", "dx", "y")
    strides = [f"{tensor}_{step}" for tensor in tensors for step in ("token", "head")]
    return _case(
        f"rms_norm_{'again' if again else 'bwd'}_{name}_{dtype}",
        _rms_norm_bwd_kernel,
        {**pointers, "p_residual_grad": dtype if fused else None, "p_dx": dtype, "p_y": dtype if again else None},
        dict.fromkeys(("n_rows", "heads", "d", *strides), "i32") | {"eps": "fp32"},
        {
            "ROUND_NORMED": style == "llama",
            "ONE_PLUS_WEIGHT": style == "gemma",
            "HAS_RESIDUAL": fused,
            **tile_of(width),
        },
    )


CASES = [make(name, dtype) for make in (_forward, _backward) for name in VARIANTS for dtype in DTYPES] + [
    _backward(name, dtype, again=True) for name in VARIANTS for dtype in DTYPES
]
