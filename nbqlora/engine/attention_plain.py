"""Attention document by document, in torch's public functions: for CPUs, and where no private operator serves.

The backward computes the forward of one document again and differentiates it, so that nothing is kept beside q, k, v
and the result, and no more than one document's scores exist at once, if they exist at all: torch's own kernels behind
``scaled_dot_product_attention`` make none. Keys and values are repeated for the heads that share them: on a card
without flash ``enable_gqa`` leaves only the implementation that writes all scores out (11 ms a layer in place of 3.1,
and 1.6 GiB in place of 0.16; measured as the figures in ``attention``).

Each document is a call, so the host has to know its length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention

from nbqlora.engine.attention_documents import Documents

# (q, k, v), each [rows, heads, n, dim] with as many heads, -> the result, likewise.
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def sdpa(scale: float, window: int | None) -> Attend:
    """Torch's own attention; a mask is made only where a window needs one."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        n = q.shape[2]
        seen = None if window is None or window >= n else visible(n, window, q.device)
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale)

    return attend


def written_out(scale: float, window: int | None, softcap: float | None) -> Attend:
    """All scores of a document as a matrix, capped: ``softcap * tanh(scores / softcap)``."""

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # q is scaled before the product: half precision could not hold every score unscaled.
        scores = ((q * scale) @ k.transpose(-1, -2)).to(torch.promote_types(q.dtype, torch.float32))
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~visible(q.shape[2], window, q.device), -torch.inf)
        return scores.softmax(-1).to(v.dtype) @ v

    return attend


def visible(n: int, window: int | None, device: torch.device) -> torch.Tensor:
    """Which keys ``[n, n]`` a token sees: itself and those before it, ``window`` of them in all."""
    seen = torch.ones(n, n, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)


def plain_forward(
    attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, rows_at_once: bool
) -> torch.Tensor:
    """Result ``[tokens, heads, dim]`` of the documents, one after the other.

    Args:
        rows_at_once: documents that are rows of a batch go through ``attend`` in one call.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for begin, end, rows in _parts(documents, rows_at_once):
        with torch.no_grad():
            found = _through(attend, *(_part(x, begin, end, rows) for x in (q, k, v)))
            _part(out, begin, end, rows).copy_(found)
    return out


def plain_backward(
    attend: Attend,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    rows_at_once: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v, in their shapes, contiguous."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for begin, end, rows in _parts(documents, rows_at_once):
        inputs = [_part(x.detach(), begin, end, rows).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            found = _through(attend, *inputs)
        gradients = torch.autograd.grad(found, inputs, _part(dout.detach(), begin, end, rows))
        for whole, gradient in zip((dq, dk, dv), gradients, strict=True):
            _part(whole, begin, end, rows).copy_(gradient)
    return dq, dk, dv


def repeated(x: torch.Tensor, group: int) -> torch.Tensor:
    """Each head ``group`` times, side by side: ``[..., heads, dim]`` -> ``[..., heads * group, dim]``."""
    if group == 1:
        return x
    heads, dim = x.shape[-2:]
    return x.unsqueeze(-2).expand(*x.shape[:-2], heads, group, dim).flatten(-3, -2)


def _through(attend: Attend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, repeated(k, group), repeated(v, group)))
    return attend(q, k, v).transpose(1, 2)


def _parts(documents: Documents, rows_at_once: bool) -> list[tuple[int, int, int]]:
    """First token, end and rows of each call."""
    if rows_at_once and documents.cu_seqlens is None:
        return [(0, documents.tokens, documents.rows)]
    return [(begin, end, 1) for begin, end in documents.spans()]


def _part(x: torch.Tensor, begin: int, end: int, rows: int) -> torch.Tensor:
    """A view of these tokens: ``[rows, n, heads, dim]``."""
    return x[begin:end].unflatten(0, (rows, -1))
