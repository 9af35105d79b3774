"""Attention written out in fp64, documents to try it on, and the criterion: no worse than eager in the same dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nbqlora.engine.attention import AttentionKind, Documents, attention_backward, attention_forward

Four = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def packed(
    lengths: Sequence[int], *, padding: int = 0, device: str = "cpu", known: bool = True, bound: int | None = None
) -> Documents:
    """Documents of these lengths in one row, ``padding`` more of no tokens behind them."""
    lengths = (*lengths, *(0 for _ in range(padding)))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    longest = bound or max(lengths)
    return Documents(
        rows=1, seq=sum(lengths), cu_seqlens=cu, max_tokens=longest, lengths=tuple(lengths) if known else None
    )


def dense(rows: int, seq: int) -> Documents:
    """Each row one document."""
    return Documents(rows=rows, seq=seq, cu_seqlens=None, max_tokens=seq, lengths=None)


def inputs(tokens: int, hq: int, hk: int, dim: int, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0) -> Four:
    """q, k, v as views of one buffer, side by side, and a gradient of the result."""
    generator = torch.Generator().manual_seed(seed)
    joined = torch.randn(tokens, (hq + 2 * hk) * dim, generator=generator).to(device, dtype)
    q, k, v = (x.unflatten(1, (-1, dim)) for x in joined.split([hq * dim, hk * dim, hk * dim], dim=1))
    dout = torch.randn(tokens, hq, dim, generator=generator).to(device, dtype)
    return q, k, v, dout


def eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """A softmax over explicit scores, document by document, in the dtype of the inputs."""
    group = q.shape[1] // k.shape[1]
    found = []
    for begin, end in documents.spans():
        a, b, c = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        b, c = b.repeat_interleave(group, 0), c.repeat_interleave(group, 0)
        scores = (a @ b.mT) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(end - begin, device=q.device)
        distance = at[:, None] - at[None, :]
        hidden = (distance < 0) | (distance >= (window or end))
        wide = torch.promote_types(q.dtype, torch.float32)
        found.append((scores.masked_fill(hidden, -torch.inf).to(wide).softmax(-1).to(q.dtype) @ c).transpose(0, 1))
    return torch.cat(found)


def by_autograd(four: Four, documents: Documents, dtype: torch.dtype, **how: float | int | None) -> Four:
    """Result and gradients of :func:`eager` in ``dtype``."""
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in four[:3])
    out = eager(q, k, v, documents, **how)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), four[3].to(dtype))


def ours(kind: AttentionKind, four: Four, documents: Documents, **how: float | int | None) -> Four:
    """Result and gradients of a kind."""
    q, k, v, dout = four
    out, saved = attention_forward(kind, q, k, v, documents, **how)
    return out, *attention_backward(kind, dout, q, k, v, out, saved, documents, **how)


def assert_as_good(found: Four, reference: Four, truth: Four, *, roundings: int = 1) -> None:
    """Largest and mean error against the truth, by eager's in that dtype.

    The largest may be more by ``roundings`` of the largest value, the mean by half: kernels take the sum of a token's
    gradient from the rounded result, where eager sums before it rounds. A gradient that is zero (a token that sees only
    itself) is a difference of two that are not: a rounding is one of the largest of all values then.
    """
    largest = max(x.abs().max() for x in truth)
    for name, a, b, exact in zip(("out", "dq", "dk", "dv"), found, reference, truth, strict=True):
        assert a.shape == exact.shape and a.dtype == b.dtype, name
        error, allowed = (a.double() - exact).abs(), (b.double() - exact).abs()
        rounding = roundings * torch.finfo(a.dtype).eps * (exact.abs().max() if exact.any() else largest)
        assert error.max() <= allowed.max() + rounding, (name, float(error.max()), float(allowed.max()))
        assert error.mean() <= 1.5 * allowed.mean() + rounding / 100, (name, float(error.mean()), float(allowed.mean()))
