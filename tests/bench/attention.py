"""Each kind of attention on one card: milliseconds and memory of a layer, forward and backward.

    python tests/bench/attention.py

``eager`` is the time of calls one after the other, ``replay`` that of the same as a CUDA graph, where the kind can be
captured. ``kept`` is what stays between forward and backward beside q, k, v and the result; ``peak`` what both take at
most, result and gradients included. "off" are calls as on a card without flash and cuDNN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from nbqlora.engine.attention import (
    AttentionKind,
    Documents,
    attention_backward,
    attention_forward,
)

FLASH, EFFICIENT, CUDNN, SDPA = (
    AttentionKind.FLASH,
    AttentionKind.EFFICIENT,
    AttentionKind.CUDNN,
    AttentionKind.SDPA,
)
PACK = (1900, 1100, 640, 300, 156)
REPEATS = 10


def packed(padding_to: int, bound: int | None = None) -> Documents:
    """The pack, filled up with documents of no tokens to a number of documents."""
    lengths = (*PACK, *(0 for _ in range(padding_to - len(PACK))))
    cu = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    return Documents(rows=1, seq=sum(PACK), cu_seqlens=cu, max_tokens=bound or max(PACK), lengths=lengths)


def dense(rows: int, seq: int) -> Documents:
    """Each row one document."""
    return Documents(rows=rows, seq=seq, cu_seqlens=None, max_tokens=seq, lengths=None)


@contextmanager
def as_without_flash() -> Iterator[None]:
    """What ``scaled_dot_product_attention`` chooses on a T4."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
        torch.backends.cuda.enable_cudnn_sdp(True)


def milliseconds(work: Callable[[], object]) -> float:
    """Median of a few."""
    work()
    found = []
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return sorted(found)[REPEATS // 2]


def replayed(work: Callable[[], object]) -> float:
    """Milliseconds of the work as a graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return milliseconds(graph.replay)


def measure(kind: AttentionKind, documents: Documents, dim: int, dtype: torch.dtype) -> dict[str, Any]:
    """One line of the table; 32 heads, 8 of keys."""
    torch.manual_seed(0)
    joined = torch.randn(documents.tokens, 48 * dim, device="cuda", dtype=dtype)
    q, k, v = (x.unflatten(1, (-1, dim)) for x in joined.split([32 * dim, 8 * dim, 8 * dim], dim=1))
    dout = torch.randn(documents.tokens, 32, dim, device="cuda", dtype=dtype)
    kept: list[int] = []

    def forward() -> Any:
        return attention_forward(kind, q, k, v, documents, scale=dim**-0.5)

    def both() -> None:
        out, saved = forward()
        kept.append(sum(x.nbytes for x in saved))
        attention_backward(kind, dout, q, k, v, out, saved, documents, scale=dim**-0.5)

    both()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "forward": milliseconds(forward),
        "eager": milliseconds(both),
        "replay": None if kind is SDPA else replayed(both),
        "kept": kept[-1] / 2**20,
        "peak": peak / 2**20,
    }


def lines() -> Iterator[tuple[str, str, AttentionKind, Documents, int, Any]]:
    """Workload, what, kind, documents, width of a head, context to measure in."""
    for name, documents, dim in (("8B 2x2048", dense(2, 2048), 128), ("1B 4x2048", dense(4, 2048), 64)):
        for kind in (FLASH, CUDNN, EFFICIENT, SDPA):
            yield name, kind.value, kind, documents, dim, None
        yield name, "sdpa, off", SDPA, documents, dim, as_without_flash
    for name, dim in (("8B pack of 5", 128), ("1B pack of 5", 64)):
        for kind in (FLASH, EFFICIENT, SDPA):
            yield name, kind.value, kind, packed(len(PACK)), dim, None
        yield name, "sdpa, off", SDPA, packed(len(PACK)), dim, as_without_flash
        for count in (8, 16, 64):
            for kind in (FLASH, EFFICIENT):
                yield name, f"{kind.value}, {count}", kind, packed(count), dim, None
                yield name, f"{kind.value}, {count}, bound 4096", kind, packed(count, 4096), dim, None


def main() -> None:
    """Print the table."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ms and MiB")
    titles = ("forward", "eager", "replay", "kept", "peak")
    print(f"{'':14}{'':42}" + "".join(f"{t:>10}" for t in titles))
    dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    for name, what, kind, documents, dim, context in lines():
        try:
            if context is None:
                found = measure(kind, documents, dim, dtype)
            else:
                with context():
                    found = measure(kind, documents, dim, dtype)
        except RuntimeError as error:
            print(f"{name:14}{what:42}  {str(error).splitlines()[0][:100]}")
            continue
        print(f"{name:14}{what:42}" + "".join(f"{'-' if v is None else f'{v:.3f}':>10}" for v in found.values()))


if __name__ == "__main__":
    main()
