"""Attention by the memory-efficient operator, for cards without flash and for fp32.

What it costs beside its result (read in the sources of torch 2.13, fp32 is 4 bytes): the forward writes its log-sum-exp
as ``[documents, heads, longest]``, and the backward holds dq in fp32 for every document, those of no tokens included,
at the *longest* length. 16 documents of at most 2,048 tokens in a pack of 2,048, with 32 heads of 128, would so keep
4 MiB a layer, and take 512 MiB in the backward. So only each token's own value is kept, put back in place in the
backward, and that runs over as many heads at once as ``WORKSPACE_BYTES`` allow. Keys and values are repeated for the
heads that share them: the operator wants as many heads of each.
"""

from __future__ import annotations

import torch

from nbqlora.engine.attention_documents import Documents, token_places
from nbqlora.engine.attention_operators import Gradients, aligned, operator, rows
from nbqlora.engine.attention_plain import repeated

# The memory-efficient operator's name for "causal, both ends aligned at the first token".
_CAUSAL = 1
# Its kernels read log-sum-exps 32 at a time.
_LSE_ALIGNMENT = 32
# What its backward may take for dq in fp32, which is not kept.
WORKSPACE_BYTES = 2**28


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
) -> Gradients:
    """Gradients of q, k and v."""
    lse, *rng = saved
    if documents.cu_seqlens is not None:
        lse = _in_place(lse, documents)
    group, kv_heads = q.shape[1] // k.shape[1], k.shape[1]
    at_once = _kv_heads_at_once(q, group, documents)
    found = []
    for begin in range(0, kv_heads, at_once):
        kv, own = slice(begin, begin + at_once), slice(begin * group, (begin + at_once) * group)
        heads = (dout[:, own], q[:, own], k[:, kv], v[:, kv], out[:, own], lse[:, own])
        found.append(_efficient_heads(*heads, rng, documents, scale, window))
    if len(found) == 1:
        return found[0]
    dq, dk, dv = (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    return dq, dk, dv


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


def _kv_heads_at_once(q: torch.Tensor, group: int, documents: Documents) -> int:
    """Heads of k whose part of the workspace fits."""
    a_head = documents.count * documents.longest * q.shape[2] * 4
    return max(1, WORKSPACE_BYTES // (a_head * group))
