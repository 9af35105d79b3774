"""Attention's kernels on a card: against fp64 and documents alone; captured, without waiting, in bounded memory."""

from __future__ import annotations

import pytest
import torch

from nbqlora.engine.attention import (
    AttentionKind,
    Documents,
    attention_backward,
    attention_forward,
    choose_attention,
    count_documents,
    documents_from_positions,
)
from tests.engine.attention_truth import Four, assert_as_good, by_autograd, dense, inputs, ours, packed

pytestmark = pytest.mark.gpu
LENGTHS = (700, 1, 63, 255, 507, 522)
TOKENS = sum(LENGTHS)
FLASH, EFFICIENT, CUDNN, SDPA = (
    AttentionKind.FLASH,
    AttentionKind.EFFICIENT,
    AttentionKind.CUDNN,
    AttentionKind.SDPA,
)
# EFFICIENT in fp16 is what a T4 takes; a card of 8.0 and above runs other instances of the same kernels.
KINDS = [
    (FLASH, torch.bfloat16),
    (FLASH, torch.float16),
    (EFFICIENT, torch.float16),
    (EFFICIENT, torch.bfloat16),
    (EFFICIENT, torch.float32),
    (SDPA, torch.float16),
]


@pytest.fixture(autouse=True)
def runs_here(request: pytest.FixtureRequest) -> None:
    capability = torch.cuda.get_device_capability()
    given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if capability < (8, 0) and (given.get("kind") is FLASH or given.get("dtype") is torch.bfloat16):
        pytest.skip("needs capability 8.0")
    if capability < (9, 0) and given.get("kind") is CUDNN:
        pytest.skip("needs capability 9.0")


def check(kind: AttentionKind, dtype: torch.dtype, documents: Documents, dim: int, hk: int, window: int | None) -> None:
    four = inputs(documents.tokens, 8, hk, dim, dtype, device="cuda")
    how = {"scale": dim**-0.5, "window": window}
    truth = by_autograd(four, documents, torch.float64, **how)
    reference = by_autograd(four, documents, dtype, **how)
    # In fp32 the kernels multiply in three passes of a shorter format.
    assert_as_good(ours(kind, four, documents, **how), reference, truth, roundings=64 if dtype == torch.float32 else 1)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize(("dim", "hk"), [(64, 2), (128, 2), (128, 8), (96, 1)])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_pack(kind: AttentionKind, dtype: torch.dtype, dim: int, hk: int, window: int | None) -> None:
    check(kind, dtype, packed(LENGTHS, device="cuda"), dim, hk, window)


@pytest.mark.parametrize("bound", [None, 1500, TOKENS])
@pytest.mark.parametrize(("kind", "dtype"), [x for x in KINDS if x[0] is not SDPA])
def test_documents_that_fill_up(kind: AttentionKind, dtype: torch.dtype, bound: int | None) -> None:
    for padding in (1, 26):
        check(kind, dtype, packed(LENGTHS, padding=padding, device="cuda", bound=bound, known=False), 64, 2, None)
        check(kind, dtype, packed(LENGTHS, padding=padding, device="cuda", bound=bound, known=False), 64, 2, 100)


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_documents_of_one_token(kind: AttentionKind, dtype: torch.dtype) -> None:
    check(kind, dtype, packed([1] * 48, padding=16, device="cuda"), 64, 2, None)


@pytest.mark.parametrize(("dim", "hk"), [(64, 2), (128, 2), (128, 8), (128, 1)])
@pytest.mark.parametrize(("kind", "dtype"), [*KINDS, (CUDNN, torch.bfloat16), (CUDNN, torch.float16)])
def test_rows_of_one_length(kind: AttentionKind, dtype: torch.dtype, dim: int, hk: int) -> None:
    check(kind, dtype, dense(3, 507), dim, hk, None)
    if kind is not CUDNN:
        check(kind, dtype, dense(3, 507), dim, hk, 100)


@pytest.mark.parametrize("dim", [80, 192, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_kind_that_is_chosen_for_other_heads(dtype: torch.dtype, dim: int) -> None:
    given = {"dtype": dtype, "head_dim": dim, "window": None, "softcap": None, "dense": False}
    card = torch.cuda.get_device_capability()
    kind, _ = choose_attention(device_type="cuda", capability=card, **given)
    check(kind, dtype, packed(LENGTHS, padding=2, device="cuda"), dim, 2, None)


def test_heads_too_wide_for_flash() -> None:
    check(EFFICIENT, torch.float16, packed((255, 63), device="cuda"), 512, 2, None)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_pack_equals_its_documents_alone(kind: AttentionKind, dtype: torch.dtype, window: int | None) -> None:
    four = inputs(TOKENS, 8, 2, 128, dtype, device="cuda")
    how = {"scale": 128**-0.5, "window": window}
    together = ours(kind, four, packed(LENGTHS, padding=2, device="cuda"), **how)
    begin, few = 0, (64 if dtype == torch.float32 else 4) * torch.finfo(dtype).eps
    for n in LENGTHS:
        alone = ours(kind, tuple(x[begin : begin + n] for x in four), dense(1, n), **how)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[begin : begin + n], part, rtol=few, atol=few)
        begin += n


def captured(kind: AttentionKind, four: Four, documents: Documents, **how: float | int | None) -> tuple[object, Four]:
    """Both directions as two graphs of one pool, and where they put their results."""
    q, k, v, dout = four
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours(kind, four, documents, **how)
    torch.cuda.current_stream().wait_stream(side)
    pool, forward, backward = torch.cuda.graph_pool_handle(), torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(forward, pool=pool):
        out, saved = attention_forward(kind, q, k, v, documents, **how)
    with torch.cuda.graph(backward, pool=pool):
        gradients = attention_backward(kind, dout, q, k, v, out, saved, documents, **how)

    def replay() -> None:
        forward.replay()
        backward.replay()

    return replay, (out, *gradients)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("kind", [FLASH, EFFICIENT])
def test_a_replay_follows_boundaries(kind: AttentionKind, window: int | None) -> None:
    how = {"scale": 128**-0.5, "window": window}
    four = inputs(2048, 8, 2, 128, torch.float16, device="cuda")
    documents = packed(LENGTHS, padding=10, device="cuda", bound=2048, known=False)
    replay, found = captured(kind, four, documents, **how)
    for seed, lengths in enumerate([LENGTHS, (2048,), (5, 1000, 1, 1042), (128,) * 16]):
        fresh = inputs(2048, 8, 2, 128, torch.float16, device="cuda", seed=seed)
        for whole, values in zip(four, fresh, strict=True):
            whole.copy_(values)
        now = packed(lengths, padding=16 - len(lengths), device="cuda")
        documents.cu_seqlens.copy_(now.cu_seqlens)
        for x in found:
            x.fill_(torch.nan)
        replay()
        assert_as_good(
            found, by_autograd(fresh, now, torch.float16, **how), by_autograd(fresh, now, torch.float64, **how)
        )


def test_a_replay_of_cudnn() -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs capability 9.0")
    four, how = inputs(3 * 512, 8, 2, 128, torch.bfloat16, device="cuda"), {"scale": 128**-0.5}
    replay, found = captured(CUDNN, four, dense(3, 512), **how)
    fresh = inputs(3 * 512, 8, 2, 128, torch.bfloat16, device="cuda", seed=1)
    for whole, values in zip(four, fresh, strict=True):
        whole.copy_(values)
    replay()
    truth = by_autograd(fresh, dense(3, 512), torch.float64, **how)
    assert_as_good(found, by_autograd(fresh, dense(3, 512), torch.bfloat16, **how), truth)


@pytest.mark.parametrize("kind", [FLASH, EFFICIENT])
def test_nothing_waits_for_the_card(kind: AttentionKind) -> None:
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].cuda()
    four = inputs(TOKENS, 8, 2, 64, torch.float16, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        cu = documents_from_positions(positions, max_documents=9)
        documents = Documents(rows=1, seq=TOKENS, cu_seqlens=cu, max_tokens=TOKENS, lengths=None)
        ours(kind, four, documents, scale=0.125, window=100)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert count_documents(positions) == len(LENGTHS)
    assert torch.equal(cu, packed(LENGTHS, padding=3, device="cuda").cu_seqlens)


@pytest.mark.parametrize(("kind", "most_mib"), [(FLASH, 350), (EFFICIENT, 450)])
def test_memory_with_many_documents_that_fill_up(kind: AttentionKind, most_mib: int) -> None:
    """Kept: one fp32 a token and head. Unbounded, the memory-efficient backward takes 2 GiB here."""
    documents = packed((2048,), padding=63, device="cuda", known=False)
    q, k, v, dout = inputs(2048, 32, 8, 128, torch.float16, device="cuda")
    for _ in range(2):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out, saved = attention_forward(kind, q, k, v, documents, scale=0.1)
        kept = torch.cuda.memory_allocated() - before - out.nbytes
        gradients = attention_backward(kind, dout, q, k, v, out, saved, documents, scale=0.1)
        peak = torch.cuda.max_memory_allocated() - before
        del out, saved, gradients
    assert kept <= 2048 * 32 * 4 + 4096
    assert peak < most_mib * 2**20
