"""How fast this device multiplies matrices at a dtype: the one speed that a forecast needs.

As large as the products of a training step, small enough to be over at once: 4,096 cubed on a card (96 MiB of
fp16), less on a CPU. 2,048 cubed gives a lower rate on a large card (H200: 502 of 679 TFLOP/s in bf16), and steps
that were planned with it took less than planned: 244 ms of 314 (8B, 2 x 2048 tokens); with 4,096 cubed it is 242 of
233. The card is kept busy for a moment first, since clocks rise with load; the rate is still that of a short burst,
which a card at its power limit does not hold for hours.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, Literal

_WARM_UP_SECONDS = 0.1
_LIMIT_SECONDS = 0.25
_REPEATS = 5
# Launches between two CUDA events: one matmul of this size takes 0.2 ms on an H100, 6 on a T4.
_LAUNCHES = 8


def measure_matmul_flops(device_kind: Literal["cuda", "cpu"], dtype_name: str) -> float:
    """Dense matmul rate in operations a second: the median of five, after warm-up; under 0.5 s.

    Args:
        dtype_name: ``bf16``, ``fp16`` or ``fp32``.

    Raises:
        RuntimeError: torch's own, when the card has no room for the matrices.
    """
    import torch

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype_name]
    rows, inner, columns = (4096, 4096, 4096) if device_kind == "cuda" else (512, 1024, 1024)
    # Own generator: a measurement must not move the seed of a run. Random values, since zeros draw less power.
    generator = torch.Generator(device_kind).manual_seed(0)
    a = torch.randn(rows, inner, device=device_kind, generator=generator).to(dtype)
    b = torch.randn(inner, columns, device=device_kind, generator=generator).to(dtype)
    c = torch.empty(rows, columns, device=device_kind, dtype=dtype)

    def multiply() -> None:
        torch.mm(a, b, out=c)

    if device_kind == "cuda":
        seconds = _seconds_on_card(torch.cuda, multiply)
    else:
        seconds = _seconds_on_cpu(multiply)
    return 2.0 * rows * inner * columns / seconds


def _seconds_on_card(cuda: Any, multiply: Callable[[], None]) -> float:
    warm_at = time.perf_counter() + _WARM_UP_SECONDS
    while time.perf_counter() < warm_at:
        _timed_launches(cuda, multiply)
    return statistics.median(_timed_launches(cuda, multiply) for _ in range(_REPEATS))


def _timed_launches(cuda: Any, multiply: Callable[[], None]) -> float:
    start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
    start.record()
    for _ in range(_LAUNCHES):
        multiply()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000 / _LAUNCHES


def _seconds_on_cpu(multiply: Callable[[], None]) -> float:
    multiply()
    samples: list[float] = []
    stop_at = time.perf_counter() + _LIMIT_SECONDS
    while len(samples) < _REPEATS and (not samples or time.perf_counter() < stop_at):
        start = time.perf_counter()
        multiply()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)
