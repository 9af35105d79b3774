"""The one place that decides where an op runs: Triton on a CUDA card, its reference elsewhere.

triton is not there on every machine (a CPU build of torch brings none), so it is imported here, once, and kernels are
declared through :func:`jit`, which leaves them uncompiled until they are launched.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a card
    triton = tl = None

__all__ = ["HAS_TRITON", "jit", "next_power_of_2", "row_stride", "tl", "triton", "use_triton"]

HAS_TRITON = triton is not None


def jit(function: Callable[..., Any]) -> Any:
    """``triton.jit`` where triton is there; otherwise the plain function, which nothing launches."""
    return triton.jit(function) if HAS_TRITON else function


def use_triton(x: torch.Tensor) -> bool:
    """Whether an op on this tensor launches its Triton kernel."""
    return HAS_TRITON and x.is_cuda


def row_stride(x: torch.Tensor) -> int:
    """Elements from one row of ``x`` ``[rows, n]`` to the next.

    Raises:
        ValueError: a row's elements are not next to each other.
    """
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"expected [rows, n] with neighbouring elements, got shape {tuple(x.shape)}, strides {x.stride()}"
        )
    return x.stride(0)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
