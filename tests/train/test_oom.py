"""Out of memory recognized, cleaned up after, and what is lowered in which order."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.specs import LayerPolicy
from nbqlora.train.oom import Shortage, asked_bytes, attempt, out_of_memory
from nbqlora.train.rungs import Footing, Means, lower
from nbqlora.train.split import in_parts
from tests.planner.shapes import MODELS

CPU = torch.device("cpu")
KEEP, MLP, ALL = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN
LLAMA_8B = MODELS["8B"]
MEANS = Means(
    model=LLAMA_8B, itemsize=2, fused=True, chunked=True, tiles=True, slot_bytes=4096 * 4096 * 2, ram_bytes=3 << 28
)
TOP = Footing(policies=(KEEP,) * 32, loss_chunk_tokens=1024)
CUDA_TEXT = "CUDA out of memory. Tried to allocate {}. GPU 0 has a total capacity of 14.74 GiB."


def short(phase: str = "backward", asked: int | None = None, tokens: int = 4096, n: int = 4, **more: Any) -> Shortage:
    return Shortage(phase=phase, asked_bytes=asked, tokens=tokens, n_documents=n, **more)


@pytest.mark.parametrize(
    "error,asked",
    [
        (torch.OutOfMemoryError(CUDA_TEXT.format("2.50 GiB")), 5 << 29),
        (torch.OutOfMemoryError(CUDA_TEXT.format("20.00 MiB")), 20 << 20),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), None),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), None),
        (RuntimeError("Triton Error [CUDA]: out of memory"), None),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), 4096),
        (MemoryError(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_counts(error: Exception, asked: int | None) -> None:
    assert out_of_memory(error) is not None and asked_bytes(error) == asked


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("shape '[3]' is invalid for input of size 4"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        ValueError("CUDA error: out of memory"),
        DoesNotFitError("no plan fits"),
    ],
    ids=str,
)
def test_what_does_not(error: Exception) -> None:
    def work() -> None:
        raise error

    assert out_of_memory(error) is None
    with pytest.raises(type(error)) as caught:
        attempt(work, CPU)
    assert caught.value is error


def test_a_real_one_of_the_host() -> None:
    found = attempt(lambda: torch.empty(1 << 60), CPU)
    assert found == Shortage(phase="forward", asked_bytes=1 << 62, on_host=True)


def test_an_error_about_the_capture_that_it_broke_off() -> None:
    def work() -> None:
        try:
            raise torch.OutOfMemoryError(CUDA_TEXT.format("1.00 GiB"))
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    found = attempt(work, CPU)
    assert isinstance(found, Shortage) and found.asked_bytes == 1 << 30


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError(CUDA_TEXT.format("1.00 GiB"))


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_nothing_of_it_is_left_and_the_phase_is_known(phase: str) -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        held = torch.ones(8, requires_grad=True)
        out = _Fails.apply(held * 2).sum()
        made.extend([weakref.ref(held), weakref.ref(out)])
        if phase == "forward":
            raise torch.OutOfMemoryError(CUDA_TEXT.format("1.00 GiB"))
        out.backward()

    gc.disable()
    try:
        found = attempt(work, CPU)
        alive = [r() is not None for r in made]
    finally:
        gc.enable()
    assert isinstance(found, Shortage) and found.phase == phase
    assert alive == [False, False], "without a collection"


def ways_down(now: Footing, what: Callable[[Footing], Shortage], means: Means) -> list[tuple[Footing, str]]:
    found = []
    while (step := lower(now, what(now), means)) is not None:
        now = step[0]
        found.append(step)
        assert len(found) < 100, "it ends"
    return found


def test_all_the_way_down() -> None:
    def fails(now: Footing) -> Shortage:
        # What runs at once: four documents of 1,024 tokens, then fewer.
        n = 4 if not now.part_tokens else max(1, now.part_tokens // 1024)
        return short(asked=1 << 20, tokens=n * 1024, n=n)

    words = [text for _, text in ways_down(TOP, fails, MEANS)]
    kinds = [text.split()[0] + " " + text.split()[-1] for text in dict.fromkeys(words)]
    assert words[:2] == ["the loss takes 256 tokens at once", "the loss takes 64 tokens at once"]
    assert words[2:10] == ["4 more layers compute their MLP again in the backward"] * 8
    assert words[10:18] == ["4 more layers keep their input alone"] * 8
    # 24 inputs of 32 MiB fit into 0.75 GiB of host memory.
    assert words[18:24] == ["the inputs of 4 more layers lie in host memory"] * 6
    assert words[24:26] == [f"micro-batches of more than {n:,} tokens run in parts" for n in (2048, 1024)]
    assert words[26:] == ["MLPs take 256 tokens at once", "MLPs take 64 tokens at once"]
    assert len(kinds) == len(set(words))
    last = ways_down(TOP, fails, MEANS)[-1][0]
    assert last.policies == (OFFLOAD,) * 24 + (ALL,) * 8 and last.host_bytes == 24 * MEANS.slot_bytes
    assert last.part_tokens == 1024 and last.captures and last.eval_part_tokens == 0


def test_first_layers_first_and_as_many_as_are_missing() -> None:
    now = replace(TOP, loss_chunk_tokens=64, policies=(ALL,) * 4 + (MLP,) * 4 + (KEEP,) * 24)
    mlp = 2 * LLAMA_8B.d_ff * 4096 * 2
    found = lower(now, short(asked=7 * mlp), MEANS)
    assert found is not None and found[0].policies == (ALL,) * 4 + (MLP,) * 11 + (KEEP,) * 17
    everything = lower(now, short(asked=1 << 40), MEANS)
    assert everything is not None and everything[0].policies == (ALL,) * 4 + (MLP,) * 28
    unknown = lower(now, short(asked=None), MEANS)
    assert unknown is not None and unknown[1].startswith("4 more layers")


def test_layers_that_join_stay_and_stock_layers_recompute_at_once() -> None:
    now = replace(TOP, loss_chunk_tokens=64, policies=(ALL, JOIN) * 2 + (KEEP,) * 28)
    found = ways_down(now, lambda _: short(asked=1 << 40, n=1), replace(MEANS, ram_bytes=1 << 40, tiles=False))
    assert found[-1][0].policies == (OFFLOAD, JOIN) * 2 + (OFFLOAD,) * 28
    stock = lower(replace(now, policies=(KEEP,) * 32), short(), replace(MEANS, fused=False))
    assert stock is not None and stock[0].policies == (ALL,) * 4 + (KEEP,) * 28


def test_what_is_not_there_is_not_lowered() -> None:
    poor = replace(MEANS, chunked=False, tiles=False, ram_bytes=MEANS.slot_bytes - 1)
    bottom = replace(TOP, policies=(ALL,) * 32)
    assert lower(bottom, short(n=1), poor) is None
    found = lower(bottom, short(n=2, tokens=999), poor)
    assert found is not None and found[0].part_tokens == 500
    assert lower(TOP, short("optimizer", tokens=0, n=0), MEANS) is None


def test_an_evaluation_lowers_its_own() -> None:
    words = [w for _, w in ways_down(TOP, lambda f: short("eval", n=2 if f.eval_part_tokens > 9 else 1), MEANS)]
    assert words[:2] == ["the loss takes 256 tokens at once", "the loss takes 64 tokens at once"] and len(words) == 2
    found = lower(replace(TOP, loss_chunk_tokens=64), short("eval"), MEANS)
    assert found == (
        replace(TOP, loss_chunk_tokens=64, eval_part_tokens=2048),
        "evaluation takes no more than 2,048 tokens at once",
    )


def test_a_capture_without_room() -> None:
    found = lower(TOP, short(capturing=True), MEANS)
    assert found is not None and found[0] == replace(TOP, captures=False)
    again = lower(found[0], short(capturing=True), MEANS)
    assert again is not None and again[0].loss_chunk_tokens == 256


def test_a_host_that_is_full_is_not_filled_again() -> None:
    now = replace(TOP, loss_chunk_tokens=64, policies=(OFFLOAD,) * 32, host_bytes=32 * MEANS.slot_bytes)
    found = lower(now, short(on_host=True, n=1), replace(MEANS, tiles=False))
    assert found is not None and found[0].policies == (ALL,) * 32 and found[0].host_bytes == 0
    assert lower(found[0], short(n=1), replace(MEANS, tiles=False)) is None


def test_a_full_host_is_none_of_the_cards_business() -> None:
    assert lower(TOP, short(on_host=True), MEANS) is None
    found = lower(TOP, short(on_host=True), replace(MEANS, on_card=False))
    assert found is not None and found[0].loss_chunk_tokens == 256


def test_parts_get_smaller_however_a_batch_is_filled_up() -> None:
    now, sizes = replace(TOP, loss_chunk_tokens=64, policies=(ALL,) * 32), []
    while (found := lower(now, short(tokens=64, n=2), replace(MEANS, ram_bytes=0))) and len(sizes) < 20:
        now = found[0]
        sizes.append(now.part_tokens)
        if now.part_tokens == 1:
            break
    assert sizes == [32, 16, 8, 4, 2, 1]


def batch(*lengths: int, padded: bool) -> dict[str, Any]:
    ids = [torch.arange(1, n + 1) + 100 * i for i, n in enumerate(lengths)]
    if padded:
        pad = torch.nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(t) for t in ids], batch_first=True)
        labels = pad(ids, batch_first=True, padding_value=-100)
        return {"input_ids": pad(ids, batch_first=True), "labels": labels, "attention_mask": mask}
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    joined = torch.cat(ids)[None]
    return {"input_ids": joined, "labels": joined.masked_fill(positions == 0, -100), "position_ids": positions}


@pytest.mark.parametrize("padded,expected", [(True, [[5, 3], [2], [9], [1]]), (False, [[5, 3, 2], [9, 1]])])
def test_cut_between_documents(padded: bool, expected: list[list[int]]) -> None:
    whole = batch(5, 3, 2, 9, 1, padded=padded)
    parts = in_parts(whole, 10, list)  # type: ignore[arg-type]
    lengths = [[len(e["input_ids"]) for e in part] for part in parts]
    # A document of one token teaches nothing and is left out.
    assert lengths == [[n for n in part if n > 1] for part in expected if part != [1]]
    tokens = [t for part in parts for e in part for t in e["input_ids"]]
    assert tokens == [t + 100 * i for i, n in enumerate((5, 3, 2, 9)) for t in range(1, n + 1)]
    assert in_parts(whole, 0, list) == in_parts(whole, 45, list) == [whole]  # type: ignore[arg-type]
