"""The arena and captured kernels on a real card: streams, graphs, exceptions, a second card."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nbqlora.kernels.glu import glu_backward
from nbqlora.kernels.rms_norm import rms_norm_forward
from nbqlora.kernels.rope import rope_forward
from nbqlora.memory.arena import ArenaError, DequantArena
from tests.kernels.weights import ours, quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
CARD = torch.device("cuda", 0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=CARD, dtype=torch.float16)


def captured(step: Callable[[], Any], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of ``step``, warmed up on ``stream``."""
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph


def test_every_op_replays_from_a_graph() -> None:
    x, w, d = (random(*shape) for shape in ((64, 4096), (4096,), (64, 4096)))
    q, cos, sin = random(1, 8, 64, 128), *(random(64, 128) for _ in "cs")
    packed, state = quantized(256, 4096, device="cuda")
    out = torch.empty(256, 4096, dtype=torch.float16, device=CARD)
    results: dict[str, Any] = {}

    def step() -> None:
        results["norm"] = rms_norm_forward(x, w, 1e-5)
        results["glu"] = glu_backward(d, x, x)[0]
        results["rope"] = rope_forward(q, q, cos, sin)[0]
        results["nf4"] = ours(packed, state, out)

    graph = captured(step, torch.cuda.Stream())
    x.normal_()
    q.normal_()
    out.fill_(0)
    graph.replay()
    replayed = {k: v.clone() for k, v in results.items()}
    step()
    for name, value in results.items():
        assert torch.equal(value, replayed[name]), name


def products(arena: DequantArena, weights: list[Any], x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Sum of x times each weight, each decoded into the arena, many times over."""
    total = torch.zeros(x.shape[0], 4096, dtype=torch.float32, device=CARD)
    for _ in range(repeats):
        for packed, state in weights:
            with arena.lend((4096, x.shape[1]), torch.float16, CARD) as weight:
                ours(packed, state, weight)
                total += x @ weight.t()
    return total


def test_two_streams_borrow_at_once_without_mixing_their_weights() -> None:
    arena = DequantArena.for_weights([4096 * 4096], torch.float16)
    parts = [([quantized(4096, 4096, device="cuda") for _ in range(2)], random(32, 4096)) for _ in range(2)]
    want = [products(arena, *part, repeats=20) for part in parts]
    streams = [torch.cuda.Stream() for _ in parts]
    torch.cuda.synchronize()
    got: list[Any] = [None, None]
    for i, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000)
            got[i] = products(arena, *parts[i], repeats=20)
    torch.cuda.synchronize()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    assert arena.held_bytes == 3 * arena.n_bytes


def test_an_arena_serves_a_captured_step_from_the_slab_that_it_shares() -> None:
    arena = DequantArena.for_weights([4096 * 4096], torch.float16)
    weights, x = [quantized(4096, 4096, device="cuda")], random(32, 4096)
    want, stream = products(arena, weights, x, repeats=2), torch.cuda.Stream()
    arena.share(stream)
    results: list[torch.Tensor] = []
    graph = captured(lambda: results.append(products(arena, weights, x, repeats=2)), stream)
    results[-1].zero_()
    graph.replay()
    torch.testing.assert_close(results[-1], want)
    assert arena.held_bytes == arena.n_bytes


def test_a_slab_is_not_made_while_a_graph_is_captured() -> None:
    arena = DequantArena(1 << 20)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        zero = torch.zeros(1, device=CARD)
        with pytest.raises(ArenaError, match=r"before the capture, share\(stream\) the current stream's"):
            arena.lend((8,), torch.float32, CARD).__enter__()
    graph.replay()
    assert zero.item() == 0


def test_an_arenas_memory_goes_with_it_also_after_an_exception() -> None:
    before = torch.cuda.memory_allocated()
    arena = DequantArena(64 << 20)
    with pytest.raises(ZeroDivisionError), arena.lend((1024, 1024), torch.float32, CARD):
        raise ZeroDivisionError
    assert torch.cuda.memory_allocated() == before + (64 << 20)
    del arena
    assert torch.cuda.memory_allocated() == before


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_a_loan_on_another_card_than_the_current_one_is_served_there() -> None:
    arena, other = DequantArena(1 << 20), torch.device("cuda", 1)
    with torch.cuda.device(0), arena.lend((8,), torch.float32, other) as buffer:
        assert buffer.device == other
