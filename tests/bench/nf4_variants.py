"""Time of unpacking 4-bit weights on a card, by tile, beside a copy of as many bytes and bitsandbytes.

    python -m tests.bench.nf4_variants [--dtype bfloat16|float16]

Bytes are 0.516 read and 2 written an element. Calls go round sets of tensors that together are far larger than L2, in a
CUDA graph, so that no launch waits for Python; the median of ten replays is shown. Nothing empties L2 in between as
``do_bench`` does by filling it: what it fills is written back in the time that is measured. A tile is timed once its
result is equal to that of bitsandbytes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from bitsandbytes import functional
from triton.testing import do_bench_cudagraph

from nbqlora.kernels.nf4 import TILE, Nf4, launch

SHAPES = ((14336, 4096), (4096, 14336), (1024, 4096))
ROUND_BYTES = 400 << 20
# Units a program does at a time, how often, warps. One unit a thread, or four, which are then loaded together.
TILES = (
    (128, 1, 4), (128, 2, 4), (128, 4, 4), (128, 8, 4), (128, 16, 4),
    (256, 2, 8), (256, 4, 8), (512, 2, 16), (512, 1, 4), (512, 2, 4), (1024, 1, 8),
)  # fmt: skip
BESIDE = 16


def quantized(rows: int, cols: int) -> tuple[torch.Tensor, Any, Nf4]:
    """Packed weight and state of bitsandbytes, doubly quantized, and the same as the op takes it."""
    w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16)
    packed, state = functional.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    twice = {"nested_absmax": state.state2.absmax, "nested_code": state.state2.code, "offset": state.offset}
    return packed, state, Nf4(packed.view(-1), state.absmax, state.code, rows, cols, **twice)


def microseconds(call: Callable[[Any], Any], sets: list[Any]) -> float:
    """Of one call, going round the sets."""
    turn = itertools.cycle(sets)
    return 1e3 * do_bench_cudagraph(lambda: call(next(turn)), rep=20, return_mode="median")


def measure(rows: int, cols: int, dtype: torch.dtype) -> None:
    """The table of one shape."""
    packed, state, weight = quantized(rows, cols)
    state.dtype = dtype
    true = functional.dequantize_4bit(packed, state)
    moved = packed.numel() + weight.absmax.numel() + rows * cols * dtype.itemsize
    count = max(2, -(-ROUND_BYTES // moved))
    sets = []
    for _ in range(count):
        mine, states = replace(weight, packed=weight.packed.clone(), absmax=weight.absmax.clone()), copy.copy(state)
        states.absmax = mine.absmax
        out = torch.empty(rows, cols + BESIDE, device="cuda", dtype=dtype)
        sets.append((mine, mine.packed.view(packed.shape), states, out.view(-1)[: rows * cols].view(rows, cols), out))
    pairs = [torch.zeros(2, moved // 2, dtype=torch.uint8, device="cuda") for _ in sets]
    extra = torch.randn(rows, BESIDE, device="cuda")

    copied = microseconds(lambda pair: pair[1].copy_(pair[0]), pairs)

    def show(name: str, took: float) -> None:
        print(f"  {name:32} {took:8.1f} us {moved / took / 1e3:7.0f} GB/s {copied / took:6.0%} of the copy", flush=True)

    print(f"{rows} x {cols}, {moved / 1e6:.1f} MB, {count} sets")
    show("copy_", copied)
    show("bitsandbytes", microseconds(lambda s: functional.dequantize_4bit(s[1], s[2]), sets))
    for lookup, (block, chunks, num_warps) in itertools.product(("global", "shared"), TILES):
        tile = {"LOOKUP": lookup, "BLOCK": block, "CHUNKS": chunks, "num_warps": num_warps}
        found = launch(weight, torch.full_like(true, torch.nan), None, 0, tile)
        assert torch.equal(found, true), tile
        chosen = " (chosen)" if tile == TILE else ""
        name = f"{lookup} {block} x {chunks}, {num_warps} warps{chosen}"
        show(name, microseconds(lambda s, tile=tile: launch(s[0], s[3], None, 0, tile), sets))
    show(f"chosen + {BESIDE} columns", microseconds(lambda s: launch(s[0], s[4], extra, 0, TILE), sets))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    dtype = getattr(torch, parser.parse_args().dtype)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}")
    for rows, cols in SHAPES:
        measure(rows, cols, dtype)


if __name__ == "__main__":
    main()
