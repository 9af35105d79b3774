"""The criterion of the elementwise ops' tests: no worse against an fp64 truth than the eager path in the same dtype.

Tensors live on the card where there is one, so the same tests run the compiled kernels there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 is wrong in Triton's interpreter.
KERNEL_DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
ALL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# Share of the largest value that an error may exceed eager's by. A kernel adds in another order and its exp and rsqrt
# are a few ulp of fp32 off; in half precision that can turn a rounding that was near a tie.
SLACK = {torch.float32: 1e-6, torch.float16: 2.0**-13, torch.bfloat16: 2.0**-10}
SLACK_OF_MEAN = {torch.float32: 1e-7, torch.float16: 2.0**-18, torch.bfloat16: 2.0**-15}


def assert_no_worse(ours: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor) -> None:
    """Largest and mean error of ``ours`` against those of ``eager``, which is as ``ours`` in dtype."""
    assert ours.dtype == eager.dtype and truth.dtype == torch.float64
    assert ours.shape == eager.shape == truth.shape
    assert bool(torch.isfinite(truth).all())
    error, error_of_eager = (ours.double() - truth).abs(), (eager.double() - truth).abs()
    size = truth.abs().max()
    worst, allowed = error.max(), error_of_eager.max() + SLACK[ours.dtype] * size
    assert worst <= allowed, f"largest error {worst:.3e}, allowed {allowed:.3e}"
    mean, allowed = error.mean(), error_of_eager.mean() + SLACK_OF_MEAN[ours.dtype] * size
    assert mean <= allowed, f"mean error {mean:.3e}, allowed {allowed:.3e}"


def assert_rounded_once(ours: torch.Tensor, truth: torch.Tensor) -> None:
    """In half precision, nine values of ten are the one nearest to the truth: two roundings miss it for a quarter.

    Not all are: ``1 + erf(x)`` in fp32 has few digits left where a gelu is nearly 0.
    """
    share = (ours == truth.to(ours.dtype)).double().mean()
    assert ours.dtype == torch.float32 or share > 0.9, f"{share:.1%} of the values are the nearest"


class Frame:
    """A tensor that is a view into a wider buffer full of NaN: rows are apart, and so are heads if ``gap``."""

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, *, gap: int = 0, left: int = 8, right: int = 5
    ) -> None:
        tokens, *heads, d = shape
        self.buffer = torch.full(
            (tokens, left + (heads[0] if heads else 1) * (d + gap) + right), torch.nan, dtype=dtype, device=DEVICE
        )
        inner = self.buffer[:, left : self.buffer.shape[1] - right]
        self.view = (inner.unflatten(1, (heads[0], d + gap)) if heads else inner)[..., :d]
        self._strides = self.view.stride()

    def holding(self, values: torch.Tensor) -> torch.Tensor:
        """The view, with ``values`` in it."""
        self.view.copy_(values)
        return self.view

    def assert_untouched_outside(self) -> None:
        """Everything but the view is still NaN, and nothing in the view is."""
        assert self.view.stride() == self._strides
        assert not bool(self.view.isnan().any())
        assert int((~self.buffer.isnan()).sum()) == self.view.numel()


def framed(values: torch.Tensor, gap: int = 0) -> torch.Tensor:
    """A copy of ``values`` with NaN around its rows."""
    return Frame(values.shape, values.dtype, gap=gap).holding(values)


def normal(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> torch.Tensor:
    """Seeded normal values, already representable in ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(DEVICE, dtype)


_ACCESSES = r"""
import importlib, re, sys
import triton
from triton.backends.compiler import GPUTarget

for name, kernel, signature, constexprs, options in importlib.import_module(sys.argv[1]).CASES:
    if name.startswith(tuple(sys.argv[2:])) and name.endswith("bf16"):
        # Pointers and strides divisible by 16, as a launch finds them to be.
        kinds = [(i, k) for i, (n, k) in enumerate(signature.items()) if n not in kernel.do_not_specialize]
        attrs = {(i,): [["tt.divisibility", 16]] for i, kind in kinds if kind[0] == "*" or kind == "i32"}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
        ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
        print(name, *re.findall(r"\b(?:ld|st)\.global\S*", ptx))
"""


def narrow_accesses(cases: str, *names: str) -> dict[str, list[str]]:
    """Accesses of less than 16 bytes in the PTX for capability 9.0, by case: those of bf16 that start with ``names``.

    In a process of its own, since the interpreter, once chosen, stays.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command: list[Any] = [sys.executable, "-c", _ACCESSES, cases, *names]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        name, *accesses = line.split()
        assert accesses
        found[name] = [access for access in accesses if not re.search(r"\.v4\.[bfu]32$", access)]
    return found
