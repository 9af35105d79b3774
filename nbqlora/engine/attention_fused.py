"""Attention by flash, for documents of any length or rows of one, and by cuDNN, for rows of one length.

Both let heads share keys and values. Flash keeps one fp32 a token and head. Its backward holds dq in fp32, and 128
tokens more of it for each document, those of no tokens included: 2 MiB a document with 32 heads of 128 (read in the
sources of torch 2.13). Where that would be much, heads go in groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nbqlora.engine.attention_documents import Documents
from nbqlora.engine.attention_groups import in_groups, kv_heads_at_once
from nbqlora.engine.attention_operators import Gradients, aligned, operator, rows

# Tokens that flash's dq in fp32 is longer for each document.
_TILE = 128


def flash_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, scale: float, window: int | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Result and what the backward needs: log-sum-exp, and two for the state of random numbers."""
    found = operator("_flash_attention_forward")(
        *(aligned(_batched(x, documents)) for x in (q, k, v)),
        *_flash_boundaries(documents),
        0.0,
        True,
        False,
        scale=scale,
        **_flash_window(window),
    )
    return found[0].reshape(q.shape), tuple(found[1:4])


def flash_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    documents: Documents,
    *,
    scale: float,
    window: int | None,
    over: bool = False,
) -> Gradients:
    """Gradients of q, k and v; ``over`` these, where several groups of heads follow each other and it is allowed."""
    lse, *rng = saved

    def heads(own: slice, kv: slice) -> Gradients:
        now = (q[:, own], k[:, kv], v[:, kv])
        found = operator("_flash_attention_backward")(
            _batched(dout[:, own], documents),
            *(aligned(_batched(x, documents)) for x in now),
            _batched(out[:, own], documents),
            _of_heads(lse, own),
            *_flash_boundaries(documents),
            0.0,
            True,
            *rng,
            scale=scale,
            **_flash_window(window),
        )
        return _shaped(found, now)

    return in_groups(heads, q, k, v, at_once=_at_once(q, k, documents), over=over)


def _flash_boundaries(documents: Documents) -> tuple[torch.Tensor | None, torch.Tensor | None, int, int]:
    # At 1 the operator takes each document for one token of a cache, which padding documents are not.
    longest = max(2, documents.longest) if documents.cu_seqlens is not None else documents.seq
    return documents.cu_seqlens, documents.cu_seqlens, longest, longest


def _flash_window(window: int | None) -> dict[str, int | None]:
    """Tokens to the left and right beside the token itself."""
    if window is None:
        return {"window_size_left": None, "window_size_right": None}
    return {"window_size_left": window - 1, "window_size_right": 0}


def _batched(x: torch.Tensor, documents: Documents) -> torch.Tensor:
    """As flash takes it: rows of one length have a dimension of their own, documents of any length have none."""
    return rows(x, documents) if documents.cu_seqlens is None else x


def cudnn_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, scale: float
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Result and what the backward needs: log-sum-exp, and two for the state of random numbers."""
    found = operator("_scaled_dot_product_cudnn_attention")(
        *(rows(aligned(x), documents).transpose(1, 2) for x in (q, k, v)), None, True, 0.0, True, False, scale=scale
    )
    return found[0].transpose(1, 2).reshape(q.shape), (found[1], found[6], found[7])


def cudnn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    documents: Documents,
    *,
    scale: float,
    over: bool = False,
) -> Gradients:
    """Gradients of q, k and v; ``over`` these, where several groups of heads follow each other and it is allowed."""
    lse, *rng = saved
    ends = (None, None, None, documents.seq, documents.seq, 0.0, True)

    def heads(own: slice, kv: slice) -> Gradients:
        now = (q[:, own], k[:, kv], v[:, kv])
        five = (rows(aligned(x), documents).transpose(1, 2) for x in (dout[:, own], *now, out[:, own]))
        found = operator("_scaled_dot_product_cudnn_attention_backward")(
            *five, _of_heads(lse, own), *rng, *ends, scale=scale
        )
        return _shaped([x.transpose(1, 2) for x in found], now)

    return in_groups(heads, q, k, v, at_once=_at_once(q, k, documents), over=over)


def _at_once(q: torch.Tensor, k: torch.Tensor, documents: Documents) -> int:
    """Heads of k in a group; flash's dq is a tile longer for each document."""
    more = 0 if documents.cu_seqlens is None else _TILE * documents.count
    return kv_heads_at_once(q, k, documents.tokens + more)


def _of_heads(lse: torch.Tensor, heads: slice) -> torch.Tensor:
    """Log-sum-exps of some heads: ``[heads, tokens]``, or with rows before them."""
    if heads == slice(None):
        return lse
    return (lse[heads] if lse.dim() == 2 else lse[:, heads]).contiguous()


def _shaped(found: Sequence[torch.Tensor], like: Sequence[torch.Tensor]) -> Gradients:
    dq, dk, dv = (x.reshape(y.shape) for x, y in zip(found, like, strict=True))
    return dq, dk, dv
