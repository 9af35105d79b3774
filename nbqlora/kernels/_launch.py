"""The one place that decides where an op runs: Triton on a CUDA card, its reference elsewhere.

triton is not there on every machine (a CPU build of torch brings none), so it is imported here, once, and kernels are
declared through :func:`jit`, which leaves them uncompiled until they are launched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # a machine without a card
    triton = tl = None

__all__ = [
    "HAS_TRITON",
    "jit",
    "launches_of_a_share",
    "next_power_of_2",
    "row_stride",
    "tl",
    "triton",
    "use_triton",
]

HAS_TRITON = triton is not None
# Every kernel that was declared, and its arguments for whose values it is not compiled once more.
_kernels: list[tuple[Any, frozenset[str]]] = []


def jit(function: Callable[..., Any], *, do_not_specialize: Iterable[str] = ()) -> Any:
    """``triton.jit`` where triton is there; otherwise the plain function, which nothing launches.

    Args:
        do_not_specialize: integers of the kernel for which it is not compiled once more where they divide by 16 or are
            1: those that are only compared, and another in every batch.
    """
    if not HAS_TRITON:
        return function
    kernel = triton.jit(function, do_not_specialize=list(do_not_specialize))
    _kernels.append((kernel, frozenset(do_not_specialize)))
    return kernel


@contextmanager
def launches_of_a_share(number: int, n: int) -> Iterator[None]:
    """Within, of what Triton compiles one by one only every ``n``-th is launched, the first being number ``number``.

    What others would have written stays as it was made: this is for processes that compile for each other, and for
    threads beside which nothing is launched.
    """
    met: dict[tuple[Any, ...], int] = {}
    kernels = tuple(_kernels)  # one that is declared meanwhile is launched as ever
    for kernel, any_value in kernels:
        kernel.run = partial(_in_turn, met, number, n, kernel, any_value, kernel.run)
    try:
        yield
    finally:
        for kernel, _ in kernels:
            del kernel.run


def _in_turn(
    met: dict[tuple[Any, ...], int],
    number: int,
    n: int,
    kernel: Any,
    any_value: frozenset[str],
    run: Callable[..., Any],
    /,
    *args: Any,
    **kwargs: Any,
) -> Any:
    # What is named is a constant of the kernel, or how it is compiled.
    constants = sorted((name, str(value)) for name, value in kwargs.items() if name != "grid")
    named = zip(kernel.arg_names, args, strict=False)
    compiled_for = [_compiled_for(arg) for name, arg in named if name not in any_value]
    key = (id(kernel), *compiled_for, *constants)
    turn = met.setdefault(key, len(met))
    return run(*args, **kwargs) if turn % n == number else None


def _compiled_for(value: Any) -> Any:
    """What a kernel is compiled for where this is an argument."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 1, value % 16 == 0
    return value if isinstance(value, str | bool) or value is None else type(value)


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
