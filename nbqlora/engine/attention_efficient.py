"""Attention by the memory-efficient operator, for cards without flash and for fp32.

What it costs beside its result (read in the sources of torch 2.13, fp32 is 4 bytes): the forward writes its log-sum-exp
as ``[documents, heads, longest]``, and the backward holds dq in fp32 for every document, those of no tokens included,
at the *longest* length. 16 documents of at most 2,048 tokens in a pack of 2,048, with 32 heads of 128, would so keep
4 MiB a layer, and take 512 MiB in the backward. So only each token's own value is kept, put back in place in the
backward, and that runs over as many heads at once as ``WORKSPACE_BYTES`` allow. Keys and values are repeated for the
heads that share them: the operator wants as many heads of each. They, their gradients and dq exist for one group of
heads at a time, and each group's gradients may be written over its own q, k and v, which nothing reads any more: with
65,536 tokens of 32 heads of 128, 8 of keys, in fp16, 1.0 GiB beside q, k, v and the result, where all heads at once
would take 4.8.
"""

from __future__ import annotations

import torch

from nbqlora.engine.attention_documents import Documents, token_places
from nbqlora.engine.attention_groups import in_groups, kv_heads_at_once
from nbqlora.engine.attention_operators import Gradients, aligned, operator, rows
from nbqlora.engine.attention_plain import repeated

# The memory-efficient operator's name for "causal, both ends aligned at the first token".
_CAUSAL = 1
# Its kernels read log-sum-exps 32 at a time.
_LSE_ALIGNMENT = 32


def efficient_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, *, scale: float, window: int | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Result and what the backward needs: log-sum-exp, and two for the state of random numbers."""
    group, cu = q.shape[1] // k.shape[1], documents.cu_seqlens
    out, lse, *rng = operator("_efficient_attention_forward")(
        rows(aligned(q), documents),
        *(rows(repeated(aligned(x), group), documents) for x in (k, v)),
        None,
        cu,
        cu,
        documents.longest,
        documents.longest,
        0.0,
        _CAUSAL,
        True,
        scale=scale,
        window_size=window,
    )[:4]
    if cu is not None:
        document, place = token_places(cu, documents.tokens)
        lse = lse[document, :, place]
    return out.reshape(q.shape), (lse, *rng)


def efficient_backward(
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
    if documents.cu_seqlens is not None:
        lse = _in_place(lse, documents)

    def heads(own: slice, kv: slice) -> Gradients:
        of_these = (dout[:, own], q[:, own], k[:, kv], v[:, kv], out[:, own], lse[:, own])
        return _efficient_heads(*of_these, rng, documents, scale, window)

    at_once = kv_heads_at_once(q, k, documents.count * documents.longest)
    return in_groups(heads, q, k, v, at_once=at_once, over=over)


def _efficient_heads(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    rng: list[torch.Tensor],
    documents: Documents,
    scale: float,
    window: int | None,
) -> Gradients:
    """Gradients of some heads."""
    group, cu = q.shape[1] // k.shape[1], documents.cu_seqlens
    dq, dk, dv, _ = operator("_efficient_attention_backward")(
        rows(dout, documents),
        rows(aligned(q), documents),
        *(rows(repeated(aligned(x), group), documents) for x in (k, v)),
        None,
        # The kernel does not ask for strides of its result.
        rows(out.contiguous(), documents),
        cu,
        cu,
        documents.longest,
        documents.longest,
        lse,
        0.0,
        *rng,
        _CAUSAL,
        False,
        scale=scale,
        window_size=window,
    )
    dk, dv = (x.reshape(*k.shape[:2], group, -1).sum(2) if group > 1 else x.reshape(k.shape) for x in (dk, dv))
    return dq.reshape(q.shape), dk, dv


def _in_place(lse: torch.Tensor, documents: Documents) -> torch.Tensor:
    """Log-sum-exps ``[tokens, heads]`` where the kernel looks for them: ``[documents, heads, longest]``.

    The rest is infinite, as the forward leaves it behind a document: the kernel reads there without asking.
    """
    assert documents.cu_seqlens is not None
    document, place = token_places(documents.cu_seqlens, documents.tokens)
    width = -(-documents.longest // _LSE_ALIGNMENT) * _LSE_ALIGNMENT
    placed = lse.new_full((documents.count, lse.shape[1], width), torch.inf)
    placed[document, :, place] = lse
    return placed
