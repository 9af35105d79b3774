"""Attention against a softmax in fp64, forward and gradients."""

from __future__ import annotations

import pytest
import torch

from nbqlora.engine import (
    attention_efficient,
    attention_fused,
    attention_groups,
    attention_operators,
    attention_plain,
)
from nbqlora.engine.attention import AttentionKind, Documents, attention_backward, attention_forward
from tests.engine import attention_fakes
from tests.engine.attention_truth import assert_as_good, by_autograd, dense, inputs, ours, packed

PLAIN = [AttentionKind.SDPA, AttentionKind.MATH]
FUSED = [AttentionKind.FLASH, AttentionKind.EFFICIENT]
LENGTHS = (63, 1, 17, 2, 44)
HEADS = [(4, 1), (4, 2), (4, 4)]
SCALE = 0.3


@pytest.fixture
def fake_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The private operators, in plain torch."""
    for module in (attention_efficient, attention_fused):
        monkeypatch.setattr(module, "operator", attention_fakes.OPERATORS.__getitem__)


def assert_exact(kind: AttentionKind, four: tuple[torch.Tensor, ...], documents: Documents, **how: object) -> None:
    """Equal to the truth but for the order of sums; all fp64."""
    truth = by_autograd(four, documents, torch.float64, **how)
    for name, found, exact in zip(("out", "dq", "dk", "dv"), ours(kind, four, documents, **how), truth, strict=True):
        assert found.shape == exact.shape
        assert float((found - exact).abs().max()) < 1e-12, name


@pytest.mark.parametrize("window", [None, 1, 5, 63])
@pytest.mark.parametrize(("hq", "hk"), HEADS)
@pytest.mark.parametrize("kind", PLAIN)
def test_documents_of_a_pack(kind: AttentionKind, hq: int, hk: int, window: int | None) -> None:
    documents = packed(LENGTHS, padding=3)
    assert_exact(kind, inputs(127, hq, hk, 8, torch.float64), documents, scale=SCALE, window=window)


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kind", PLAIN)
def test_rows_of_one_length(kind: AttentionKind, window: int | None) -> None:
    assert_exact(kind, inputs(3 * 21, 4, 2, 8, torch.float64), dense(3, 21), scale=SCALE, window=window)


@pytest.mark.parametrize("documents", [packed(LENGTHS), packed(LENGTHS, padding=2, known=False), dense(1, 127)])
def test_capped_scores(documents: Documents) -> None:
    four = inputs(127, 4, 2, 8, torch.float64)
    assert_exact(AttentionKind.MATH, four, documents, scale=2.0, softcap=1.5)
    assert_exact(AttentionKind.MATH, four, documents, scale=2.0, softcap=1.5, window=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", PLAIN)
def test_no_worse_than_eager(kind: AttentionKind, dtype: torch.dtype) -> None:
    documents, four = packed((255, 63, 1, 188)), inputs(507, 4, 2, 16, dtype)
    truth = by_autograd(four, documents, torch.float64, scale=0.25)
    reference = by_autograd(four, documents, dtype, scale=0.25)
    assert_as_good(ours(kind, four, documents, scale=0.25), reference, truth)


@pytest.mark.parametrize("kind", PLAIN)
def test_a_pack_equals_its_documents_alone(kind: AttentionKind) -> None:
    four = inputs(127, 4, 2, 8, torch.float32)
    together = ours(kind, four, packed(LENGTHS, padding=1), scale=SCALE)
    begin = 0
    for n in LENGTHS:
        alone = ours(kind, tuple(x[begin : begin + n].contiguous() for x in four), dense(1, n), scale=SCALE)
        for whole, part in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[begin : begin + n], part, rtol=1e-6, atol=1e-6)
        begin += n


@pytest.mark.parametrize("kind", [*PLAIN, *FUSED])
def test_nothing_given_is_written_to_and_nothing_of_it_is_kept(kind: AttentionKind, fake_card: None) -> None:
    q, k, v, dout = inputs(127, 4, 2, 8, torch.float64)
    before = [x.clone() for x in (q, k, v, dout)]
    out, saved = attention_forward(kind, q, k, v, packed(LENGTHS), scale=SCALE)
    kept_out = out.clone()
    with torch.no_grad():
        gradients = attention_backward(kind, dout, q, k, v, out, saved, packed(LENGTHS), scale=SCALE)
    assert all(map(torch.equal, (q, k, v, dout, out), (*before, kept_out)))
    assert not out.requires_grad and not any(x.requires_grad for x in (q, k, v, *gradients))
    assert sum(x.numel() for x in saved if isinstance(x, torch.Tensor)) <= 127 * 4


def test_a_mask_is_made_for_a_window_only(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    real = attention_plain.visible
    monkeypatch.setattr(attention_plain, "visible", lambda n, *rest: made.append(n) or real(n, *rest))
    four = inputs(127, 4, 2, 8, torch.float32)
    for window in (None, 63, 1000):
        ours(AttentionKind.SDPA, four, packed(LENGTHS), scale=SCALE, window=window)
    assert made == []
    ours(AttentionKind.SDPA, four, packed(LENGTHS), scale=SCALE, window=20)
    assert made == [63, 44] * 2


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize(("hq", "hk"), HEADS)
@pytest.mark.parametrize("kind", FUSED)
def test_what_stands_around_private_operators(
    kind: AttentionKind, hq: int, hk: int, window: int | None, fake_card: None
) -> None:
    four = inputs(127, hq, hk, 8, torch.float64)
    for documents in (
        packed(LENGTHS, known=False),
        packed(LENGTHS, padding=40, bound=100),
        packed([1] * 127),
        dense(1, 127),
    ):
        assert_exact(kind, four, documents, scale=SCALE, window=window)
    assert_exact(kind, inputs(96, hq, hk, 8, torch.float64), dense(3, 32), scale=SCALE, window=window)


@pytest.mark.parametrize("hk", [1, 2, 4])
def test_cudnn_takes_rows_of_one_length(hk: int, fake_card: None) -> None:
    assert_exact(AttentionKind.CUDNN, inputs(96, 4, hk, 8, torch.float64), dense(3, 32), scale=SCALE)


@pytest.mark.parametrize(("heads_at_once", "calls"), [(1, 4), (3, 2), (4, 1), (100, 1)])
def test_the_efficient_backward_bounds_its_workspace(
    heads_at_once: int, calls: int, fake_card: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = packed(LENGTHS, padding=3)
    monkeypatch.setattr(attention_groups, "WORKSPACE_BYTES", heads_at_once * 8 * 63 * 2 * 8 * 4 + 1)
    counted: list[int] = []
    real = attention_efficient._efficient_heads
    monkeypatch.setattr(attention_efficient, "_efficient_heads", lambda *a: counted.append(a[1].shape[1]) or real(*a))
    assert_exact(AttentionKind.EFFICIENT, inputs(127, 8, 4, 8, torch.float64), documents, scale=SCALE)
    assert len(counted) == calls and sum(counted) == 8


def test_rows_that_a_kernel_cannot_read_are_copied() -> None:
    wide = torch.zeros(6, 51, dtype=torch.float16)
    whole, off, odd = (x.unflatten(1, (-1, 8)) for x in (wide[:, :48].contiguous(), wide[:, 1:49], wide[:, :48]))
    assert attention_operators.aligned(whole) is whole
    for x in (off, odd):
        assert attention_operators.aligned(x).is_contiguous()


@pytest.mark.parametrize(
    ("kind", "how", "message"),
    [
        (AttentionKind.SDPA, {"softcap": 5.0}, "sdpa does not cap scores"),
        (AttentionKind.FLASH, {"softcap": 5.0}, "flash does not cap scores"),
        (AttentionKind.CUDNN, {}, "cudnn takes rows of one length without a window"),
        (AttentionKind.SDPA, {"window": 0}, "a token sees itself, so a window is at least 1, not 0"),
    ],
)
def test_what_a_kind_does_not_do(kind: AttentionKind, how: dict[str, object], message: str) -> None:
    q, k, v, _ = inputs(127, 4, 2, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention_forward(kind, q, k, v, packed(LENGTHS), scale=SCALE, **how)


def test_shapes_that_do_not_fit() -> None:
    q, k, v, _ = inputs(126, 4, 3, 8, torch.float32)
    with pytest.raises(ValueError, match=r"127 tokens in documents, q \[126, 4, 8\].*heads of q \[4, 8\] and of k"):
        attention_forward(AttentionKind.SDPA, q, k, v, packed(LENGTHS), scale=SCALE)
