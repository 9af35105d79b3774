"""Torch's private operators of attention as a card runs them, in plain torch: what they take, refuse and leave behind.

Written from the sources of torch 2.13. They stand in where there is no card, to try the functions around them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# State of random numbers: not read, but has to come back.
RNG = object()


def visible(n: int, left: int | None) -> torch.Tensor:
    at = torch.arange(n)
    distance = at[:, None] - at[None, :]
    return (distance >= 0) & (distance < (n if left is None else left))


def spans(cu: torch.Tensor | None, rows: int, seq: int) -> Iterator[tuple[int, int, int]]:
    edges = range(0, rows * seq + 1, seq) if cu is None else cu.tolist()
    for i, (begin, end) in enumerate(zip(edges, list(edges)[1:], strict=False)):
        if begin < end:
            yield i, begin, end


def attend(q: Any, k: Any, v: Any, scale: float, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Result and log-sum-exp ``[heads, n]`` of one document, ``[n, heads, dim]`` each, as many heads."""
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -torch.inf)
    lse = scores.logsumexp(-1)
    return torch.einsum("hij,jhd->ihd", (scores - lse[..., None]).exp(), v), lse


def attend_back(
    dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, scale: float, seen: torch.Tensor
) -> tuple[Any, ...]:
    """Gradients of one document from its log-sum-exp, as the kernels make them."""
    scores = (torch.einsum("ihd,jhd->hij", q, k) * scale).masked_fill(~seen, -torch.inf)
    p = (scores - lse[..., None]).exp()
    delta = (dout * out).sum(-1).T
    ds = p * (torch.einsum("ihd,jhd->hij", dout, v) - delta[..., None]) * scale
    return (
        torch.einsum("hij,jhd->ihd", ds, k),
        torch.einsum("hij,ihd->jhd", ds, q),
        torch.einsum("hij,ihd->jhd", p, dout),
    )


def efficient_forward(q, k, v, bias, cu, cu_k, max_q, max_k, dropout, mask, with_lse, *, scale, window_size=None):
    assert bias is None and dropout == 0.0 and mask == 1 and with_lse
    assert q.dim() == 4 and q.shape == k.shape == v.shape and q.stride(-1) == k.stride(-1) == 1
    assert cu is cu_k and (cu is None or (q.shape[0] == 1 and cu.dtype == torch.int32))
    rows, seq = q.shape[:2]
    longest = seq if cu is None else max_q
    width = -(-longest // 32) * 32
    lse = q.new_full((rows if cu is None else cu.numel() - 1, q.shape[2], width), torch.nan)
    out = torch.full(q.shape, torch.nan, dtype=q.dtype)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    for i, begin, end in spans(cu, rows, seq):
        n = end - begin
        assert n <= longest
        found, lse[i, :, :n] = attend(*(x[begin:end] for x in flat), scale, visible(n, window_size))
        lse[i, :, n : -(-n // 32) * 32] = torch.inf
        out.flatten(0, 1)[begin:end] = found
    return out, lse, RNG, RNG, longest, longest


def efficient_backward(
    dout, q, k, v, bias, out, cu, cu_k, max_q, max_k, lse, dropout, seed, offset, mask, bias_grad, *,
    scale, num_splits_key=None, window_size=None,
):  # fmt: skip
    assert bias is None and dropout == 0.0 and mask == 1 and not bias_grad and seed is offset is RNG
    assert q.shape == k.shape == v.shape == dout.shape and out.is_contiguous() and lse.stride(-1) == 1
    assert lse.stride(0) % 8 == lse.stride(1) % 8 == 0 and num_splits_key in (None, 1)
    rows, seq = q.shape[:2]
    assert cu is cu_k and (cu is None or 0 < max_q == max_k <= seq)
    found = [torch.full(q.shape, torch.nan, dtype=q.dtype) for _ in range(3)]
    flat = [x.flatten(0, 1) for x in (dout, q, k, v, out)]
    for i, begin, end in spans(cu, rows, seq):
        n = end - begin
        assert bool((lse[i, :, n : -(-n // 32) * 32] == torch.inf).all())
        parts = attend_back(*(x[begin:end] for x in flat), lse[i, :, :n], scale, visible(n, window_size))
        for whole, part in zip(found, parts, strict=True):
            whole.flatten(0, 1)[begin:end] = part
    return *found, torch.empty(0)


def _repeated(q, *shared):
    return [x.repeat_interleave(q.shape[-2] // x.shape[-2], -2) for x in shared]


def _summed(x, like):
    return x.unflatten(-2, (like.shape[-2], -1)).sum(-2)


def _sides(is_causal, left, right):
    assert is_causal and (right == 0 if left is not None else right is None)
    return None if left is None else left + 1


def flash_forward(
    q, k, v, cu, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale, window_size_left=None, window_size_right=None
):
    assert cu is cu_k and dropout == 0.0 and not debug and max_q == max_k and q.dim() == (4 if cu is None else 3)
    assert cu is None or max_q > 1
    rows, seq = (1, q.shape[0]) if q.dim() == 3 else q.shape[:2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (q, *_repeated(q, k, v))]
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), q.new_full((q.shape[-2], rows * seq), torch.nan)
    for _, begin, end in spans(cu, rows, seq):
        assert end - begin <= max_q
        seen = visible(end - begin, _sides(is_causal, window_size_left, window_size_right))
        out.view(-1, *q.shape[-2:])[begin:end], lse[:, begin:end] = attend(*(x[begin:end] for x in flat), scale, seen)
    return out, lse, RNG, RNG, None


def flash_backward(
    dout, q, k, v, out, lse, cu, cu_k, max_q, max_k, dropout, is_causal, seed, offset, *,
    scale, window_size_left=None, window_size_right=None,
):  # fmt: skip
    assert cu is cu_k and dropout == 0.0 and seed is offset is RNG and out.shape == q.shape == dout.shape
    rows, seq = (1, q.shape[0]) if q.dim() == 3 else q.shape[:2]
    flat = [x.reshape(-1, *x.shape[-2:]) for x in (dout, q, *_repeated(q, k, v), out)]
    found = [torch.full((rows * seq, *q.shape[-2:]), torch.nan, dtype=q.dtype) for _ in range(3)]
    for _, begin, end in spans(cu, rows, seq):
        seen = visible(end - begin, _sides(is_causal, window_size_left, window_size_right))
        parts = attend_back(*(x[begin:end] for x in flat), lse[:, begin:end], scale, seen)
        for whole, part in zip(found, parts, strict=True):
            whole[begin:end] = part
    return found[0].view(q.shape), *(_summed(x, k).view(k.shape) for x in found[1:])


def cudnn_forward(q, k, v, bias, with_lse, dropout, is_causal, debug, *, scale):
    assert bias is None and with_lse and dropout == 0.0 and is_causal and not debug
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = flash_forward(q, k, v, None, None, q.shape[1], q.shape[1], 0.0, True, False, scale=scale)
    return out.transpose(1, 2), lse, None, None, q.shape[1], q.shape[1], RNG, RNG, None


def cudnn_backward(dout, q, k, v, out, lse, seed, offset, bias, cu, cu_k, max_q, max_k, dropout, is_causal, *, scale):
    assert bias is None and cu is None and max_q == max_k == q.shape[2]
    five = (x.transpose(1, 2) for x in (dout, q, k, v, out))
    found = flash_backward(*five, lse, None, None, max_q, max_k, dropout, is_causal, seed, offset, scale=scale)
    return tuple(x.transpose(1, 2) for x in found)


OPERATORS = {
    "_flash_attention_forward": flash_forward,
    "_flash_attention_backward": flash_backward,
    "_efficient_attention_forward": efficient_forward,
    "_efficient_attention_backward": efficient_backward,
    "_scaled_dot_product_cudnn_attention": cudnn_forward,
    "_scaled_dot_product_cudnn_attention_backward": cudnn_backward,
}
