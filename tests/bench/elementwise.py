"""Time of the elementwise ops on a card beside the eager formulas, and the share of the copy bandwidth they reach.

    python -m tests.bench.elementwise [--dtype bfloat16|float16]

A row's bytes are those the op cannot do without (each input once, each output once), so the GB/s of eager show what its
extra trips cost. Each op goes round several sets of tensors, more than ``ROUND_BYTES`` in all, so that none is found in
L2; a round is captured in a CUDA graph, so that no launch waits for Python. The best of ``REPEATS`` timings is shown.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from nbqlora.kernels.glu import glu_backward_triton, glu_triton
from nbqlora.kernels.low_rank_add import low_rank_add_triton
from nbqlora.kernels.rms_norm import rms_norm_backward_triton, rms_norm_triton
from nbqlora.kernels.rope import rope_triton

TOKENS, WIDTH, WIDE, Q_HEADS, K_HEADS, DIM = 4096, 4096, 14336, 32, 8, 128
EPS = 1e-5
ROUND_BYTES = 400 << 20
REPEATS = 7
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Op:
    """An op on a set of tensors: ``reads`` and ``writes`` by shape, and the two ways to do it."""

    name: str
    reads: dict[str, tuple[int, ...]]
    writes: dict[str, tuple[int, ...]]
    ours: Callable[[Tensors], Any]
    eager: Callable[[Tensors], Any]
    # What of eager's time is not the op's: the forward that its backward goes through again.
    overhead: Callable[[Tensors], Any] | None = None

    def bytes_moved(self, item: int) -> int:
        """At least this much, with ``item`` bytes an element."""
        return item * sum(map(math.prod, (*self.reads.values(), *self.writes.values())))


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As LlamaRMSNorm does it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers' apply_rotary_pos_emb does it."""
    half = x.shape[-1] // 2
    return x * cos.unsqueeze(1) + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin.unsqueeze(1)


def by_autograd(
    formula: Callable[..., Any], names: str, grads: str
) -> tuple[Callable[[Tensors], Any], Callable[[Tensors], Any]]:
    """Forward and backward of ``formula(*tensors of names, all tensors)``, and the forward alone."""

    def forward(t: Tensors) -> tuple[Any, Any]:
        inputs = [t[name].detach().requires_grad_() for name in names.split()]
        return inputs, formula(*inputs, t)

    def both(t: Tensors) -> Any:
        inputs, outputs = forward(t)
        return torch.autograd.grad(outputs, inputs, [t[name] for name in grads.split()])

    return both, forward


def norm_ops() -> Iterator[Op]:
    """Norms of hidden states, with and without the residual, and of q's heads."""
    rows, weight, rstd = (TOKENS, WIDTH), (WIDTH,), (TOKENS,)

    def fused(t: Tensors) -> Any:
        return rms_norm_triton(t["x"], t["w"], EPS, out=t["y"], sum_with=t["r"], sum_out=t["s"])

    def backward(t: Tensors) -> Any:
        return rms_norm_backward_triton(t["dy"], t["x"], t["w"], t["rstd"], residual_grad=t.get("dr"), out=t["dx"])

    def again(t: Tensors) -> Any:
        outs = {"out": t["dx"], "y_out": t["y"]}
        return rms_norm_backward_triton(t["dy"], t["x"], t["w"], residual_grad=t["dr"], eps=EPS, **outs)

    def forward(t: Tensors) -> Any:
        return rms_norm_triton(t["x"], t["w"], EPS, out=t["y"])

    def eager_sum(t: Tensors) -> Any:
        total = t["r"] + t["x"]
        return total, norm(total, t["w"])

    eager_backward = by_autograd(lambda x, t: (norm(x, t["w"]),), "x", "dy")
    past = by_autograd(lambda x, t: (norm(x, t["w"]), x.view_as(x)), "x", "dy dr")
    heads = (TOKENS, Q_HEADS, DIM)
    yield Op("rms_norm", {"x": rows, "w": weight}, {"y": rows}, forward, lambda t: norm(t["x"], t["w"]))
    yield Op("rms_norm + residual", {"x": rows, "r": rows, "w": weight}, {"y": rows, "s": rows}, fused, eager_sum)
    reads = {"dy": rows, "x": rows, "w": weight, "rstd": rstd}
    yield Op("rms_norm backward", reads, {"dx": rows}, backward, *eager_backward)
    yield Op("rms_norm backward + residual", {**reads, "dr": rows}, {"dx": rows}, backward, *past)
    # Beside eager's forward and backward, which make the norm too.
    reads = {"dy": rows, "x": rows, "w": weight, "dr": rows}
    yield Op("rms_norm backward + residual + y", reads, {"dx": rows, "y": rows}, again, past[0])
    yield Op("head norm", {"x": heads, "w": (DIM,)}, {"y": heads}, forward, lambda t: norm(t["x"], t["w"]))
    reads = {"dy": heads, "x": heads, "w": (DIM,), "rstd": (TOKENS * Q_HEADS,)}
    yield Op("head norm backward", reads, {"dx": heads}, backward, *eager_backward)


def rope_ops() -> Iterator[Op]:
    """Rotation of q and k, and their gradients beside that of v."""
    q, k, table = (TOKENS, Q_HEADS, DIM), (TOKENS, K_HEADS, DIM), (TOKENS, DIM)
    stacked = (TOKENS, Q_HEADS + 2 * K_HEADS, DIM)

    def forward(t: Tensors) -> None:
        rope_triton(t["q"], t["k"], t["cos"], t["sin"], q_out=t["q2"], k_out=t["k2"])

    def in_place(t: Tensors) -> None:
        rope_triton(t["q"], t["k"], t["cos"], t["sin"], q_out=t["q"], k_out=t["k"])

    def backward(t: Tensors) -> None:
        dq, dk, dv = t["d"].split((Q_HEADS, K_HEADS, K_HEADS), dim=1)
        rope_triton(t["q"], t["k"], t["cos"], t["sin"], q_out=dq, k_out=dk, inverse=True, v=t["v"], v_out=dv)

    def eager(t: Tensors) -> Any:
        return rotate(t["q"], t["cos"], t["sin"]), rotate(t["k"], t["cos"], t["sin"])

    by_hand = by_autograd(lambda a, b, t: eager({**t, "q": a, "k": b}), "q k", "q k")

    reads = {"q": q, "k": k, "cos": table, "sin": table}
    yield Op("rope", reads, {"q2": q, "k2": k}, forward, eager)
    yield Op("rope in place", {**reads, "again": (TOKENS, Q_HEADS + K_HEADS, DIM)}, {}, in_place, eager)
    yield Op("rope backward with v", {**reads, "v": k}, {"d": stacked}, backward, *by_hand)


def glu_ops() -> Iterator[Op]:
    """The MLP's gate by its two common activations."""
    rows = (TOKENS, WIDE)
    for name, act in (
        ("silu", functional.silu),
        ("gelu", functional.gelu),
        ("gelu_tanh", lambda g: functional.gelu(g, approximate="tanh")),
    ):

        def forward(t: Tensors, name: Any = name) -> Any:
            return glu_triton(t["gate"], t["up"], activation=name, out=t["h"])

        def backward(t: Tensors, name: Any = name) -> Any:
            outs = {"dgate": t["dgate"], "dup": t["dup"], "h": t.get("h")}
            return glu_backward_triton(t["dh"], t["gate"], t["up"], activation=name, **outs)

        def eager(t: Tensors, act: Any = act) -> Any:
            return act(t["gate"]) * t["up"]

        by_hand = by_autograd(lambda g, u, t, eager=eager: (eager({"gate": g, "up": u}),), "gate up", "dh")
        yield Op(f"glu {name}", {"gate": rows, "up": rows}, {"h": rows}, forward, eager)
        reads, writes = {"dh": rows, "gate": rows, "up": rows}, {"dgate": rows, "dup": rows}
        yield Op(f"glu {name} backward", reads, writes, backward, *by_hand)
        yield Op(f"glu {name} backward + h", reads, {**writes, "h": rows}, backward, *by_hand)


def low_rank_ops() -> Iterator[Op]:
    """``u b^T`` added to a projection's output and the residual."""
    rows = (TOKENS, WIDTH)
    for name, r, residual in (
        ("", 16, True), (", in place", 16, False), ("", 8, True), ("", 32, True), ("", 64, True)
    ):  # fmt: skip

        def ours(t: Tensors) -> Any:
            return low_rank_add_triton(t["y"], t["u"], t["b"], residual=t.get("r"), out=t.get("out", t["y"]))

        def eager(t: Tensors) -> Any:
            t["y"].addmm_(t["u"], t["b"].t())
            return torch.add(t["r"], t["y"], out=t["out"]) if "r" in t else t["y"]

        reads = {"y": rows, "u": (TOKENS, r), "b": (WIDTH, r)}
        if residual:
            yield Op(f"low_rank_add r {r}{name}", {**reads, "r": rows}, {"out": rows}, ours, eager)
        else:
            yield Op(f"low_rank_add r {r}{name}", {**reads, "again": rows}, {}, ours, eager)


def seconds(run: Callable[[Tensors], Any], sets: list[Tensors]) -> float:
    """Of one call, over a captured round of all sets."""
    for tensors in sets:
        run(tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tensors in sets:
            run(tensors)
    graph.replay()
    best = math.inf
    for _ in range(REPEATS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 2e3 / len(sets))
    return best


def measure(op: Op, dtype: torch.dtype) -> tuple[float, float, float]:
    """Bytes of a call, and the seconds of ours and of eager."""
    moved = op.bytes_moved(dtype.itemsize)
    sets = []
    for _ in range(max(2, -(-ROUND_BYTES // moved))):
        tensors = {
            name: torch.randn(shape, device="cuda").to(dtype) for name, shape in {**op.reads, **op.writes}.items()
        }
        if "rstd" in tensors:
            tensors["rstd"] = tensors["rstd"].float()
        sets.append(tensors)
    ours, eager = seconds(op.ours, sets), seconds(op.eager, sets)
    if op.overhead is not None:
        eager -= seconds(op.overhead, sets)
    return moved, ours, eager


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of 512 MiB copied: the better of the driver's copy and a kernel of torch."""
    size = 1 << 29
    pairs = [{name: torch.zeros(size // 4, dtype=torch.int32, device="cuda") for name in "ab"} for _ in range(2)]
    by_driver = seconds(lambda t: t["b"].copy_(t["a"]), pairs)
    by_kernel = seconds(lambda t: torch.neg(t["a"], out=t["b"]), pairs)
    return 2 * size / min(by_driver, by_kernel)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    dtype = getattr(torch, parser.parse_args().dtype)
    copy = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {dtype}, {TOKENS} tokens")
    print(f"512 MiB copied: {copy / 1e9:.0f} GB/s")
    print(f"{'op':36} {'ours us':>9} {'eager us':>9} {'times':>6} {'ours GB/s':>10} {'eager GB/s':>10} {'of copy':>8}")
    for op in (*norm_ops(), *rope_ops(), *glu_ops(), *low_rank_ops()):
        moved, ours, eager = measure(op, dtype)
        rates = f"{moved / ours / 1e9:10.0f} {moved / eager / 1e9:10.0f} {moved / ours / copy:8.0%}"
        print(f"{op.name:36} {ours * 1e6:9.1f} {eager * 1e6:9.1f} {eager / ours:6.1f} {rates}")


if __name__ == "__main__":
    main()
