"""Causal self-attention over documents, forward and backward as plain functions.

A decoder layer that is one autograd function needs both directions as functions of its own, which keep the log-sum-exp
and nothing else beside what the layer keeps anyway, take q, k and v as strided views of the buffer that they were
projected into, and can be captured in a CUDA graph while boundaries of documents change between replays. No mask of
tokens by tokens is ever made for a pack. Which kernel serves is chosen by :func:`choose_attention`, with the reason.

Figures of one layer (H100; fp16; 32 heads, 8 of keys, of 128; 4,096 tokens in 5 documents; both directions; flash and
cuDNN off, as on a T4): a dense mask with transformers' default 31 ms and 8.4 GiB, one causal call a document 3.1 ms and
0.16 GiB, the memory-efficient operator with boundaries 1.65 ms and 0.28 GiB. ``tests/bench/attention.py`` measures all
kinds.
"""

from __future__ import annotations

from enum import Enum

import torch

from nbqlora.engine.attention_documents import Documents, count_documents, documents_from_positions
from nbqlora.engine.attention_efficient import efficient_backward, efficient_forward
from nbqlora.engine.attention_fused import cudnn_backward, cudnn_forward, flash_backward, flash_forward
from nbqlora.engine.attention_operators import lacks
from nbqlora.engine.attention_plain import Attend, plain_backward, plain_forward, sdpa, written_out

__all__ = [
    "AttentionKind",
    "Documents",
    "attention_backward",
    "attention_forward",
    "choose_attention",
    "count_documents",
    "documents_from_positions",
]

# Where cuDNN was measured faster than flash for rows of one length: H100, torch 2.11, 2 x 2048 tokens, 32 heads, 8 of
# keys, of 128, bf16, q, k, v strided: 0.14 ms forward and 0.49 ms backward against 0.27 and 0.89.
CUDNN_IS_FASTER: frozenset[tuple[int, int]] = frozenset({(9, 0)})


class AttentionKind(Enum):
    """What computes attention."""

    FLASH = "flash"
    CUDNN = "cudnn"
    EFFICIENT = "efficient"
    SDPA = "sdpa"
    MATH = "math"


def choose_attention(
    *,
    device_type: str,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    window: int | None,
    softcap: float | None,
    dense: bool,
) -> tuple[AttentionKind, str]:
    """The kind for a card and a layer, and the reason in words.

    Args:
        device_type: as of ``torch.device``.
        capability: of the card; None where there is none.
        dtype: of q, k and v.
        head_dim: width of a head.
        window: keys that a token sees, itself included; None for all before it.
        softcap: what caps scores; None for nothing.
        dense: each row is one document of the same length.
    """
    if softcap is not None:
        return AttentionKind.MATH, "written out, one document at a time: no kernel caps scores"
    if device_type != "cuda" or capability is None:
        where = "a CPU" if device_type == "cpu" else f"no kernel for {device_type}"
        return AttentionKind.SDPA, f"one causal SDPA a document: {where}"
    card, varlen = "capability {}.{}".format(*capability), "" if dense else ", varlen"
    if dense and window is None and capability in CUDNN_IS_FASTER and not _cudnn_lacks(dtype, head_dim):
        return AttentionKind.CUDNN, f"cuDNN: measured faster than flash on {card}"
    no_flash = _flash_lacks(capability, dtype, head_dim)
    if not no_flash:
        return AttentionKind.FLASH, f"flash{varlen}: {card}"
    no_efficient = _efficient_lacks(capability, dtype, head_dim)
    if not no_efficient:
        return AttentionKind.EFFICIENT, f"memory-efficient{varlen}, keys expanded: {no_flash}"
    return AttentionKind.SDPA, f"one causal SDPA a document: {no_flash}; {no_efficient}"


def _flash_lacks(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    if capability < (8, 0):
        return "flash needs capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return "flash takes fp16 and bf16 only"
    if head_dim > 256 or head_dim % 8:
        return f"flash takes heads of at most 256 in steps of 8, not {head_dim}"
    return lacks("flash")


def _efficient_lacks(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> str:
    if dtype == torch.bfloat16 and capability < (8, 0):
        return "memory-efficient in bf16 needs capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"memory-efficient does not take {str(dtype).removeprefix('torch.')}"
    if head_dim % 8:
        return f"memory-efficient takes heads in steps of 8, not {head_dim}"
    return lacks("memory-efficient")


def _cudnn_lacks(dtype: torch.dtype, head_dim: int) -> str:
    if dtype not in (torch.float16, torch.bfloat16) or head_dim > 128 or head_dim % 8:
        return "cuDNN takes fp16 and bf16, and heads of at most 128 in steps of 8"
    return lacks("cuDNN")


def attention_forward(
    kind: AttentionKind,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Causal attention within each document.

    Args:
        kind: as :func:`choose_attention` says.
        q: ``[tokens, heads, dim]``; strides between tokens are free, elements of a head are neighbours.
        k: ``[tokens, kv_heads, dim]``, likewise; ``kv_heads`` divides ``heads``.
        v: as ``k``.
        documents: where documents begin.
        scale: what scores are multiplied by.
        window: keys that a token sees, itself included: j with i - j < window; None for all before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``; MATH only.

    Returns:
        ``[tokens, heads, dim]`` contiguous, and what the backward needs beside q, k, v and this.

    Raises:
        ValueError: shapes that do not fit, or what the kind does not do.
    """
    _check(kind, q, k, v, documents, window, softcap)
    window = None if window is None or window >= documents.longest else window
    if kind is AttentionKind.FLASH:
        return flash_forward(q, k, v, documents, scale=scale, window=window)
    if kind is AttentionKind.EFFICIENT:
        return efficient_forward(q, k, v, documents, scale=scale, window=window)
    if kind is AttentionKind.CUDNN:
        return cudnn_forward(q, k, v, documents, scale=scale)
    attend, at_once = _plain(kind, scale, window, softcap)
    return plain_forward(attend, q, k, v, documents, rows_at_once=at_once), ()


def attention_backward(
    kind: AttentionKind,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    documents: Documents,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    over: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v from that of the result, ``dout`` ``[tokens, heads, dim]``.

    The other arguments are the forward's, its result ``out`` and what it returned as ``saved``.

    Args:
        over: nobody needs q, k and v afterwards, so that their gradients may be written over them.

    Returns:
        In the shapes of q, k and v.

    Raises:
        ValueError: as the forward does.
    """
    _check(kind, q, k, v, documents, window, softcap)
    window = None if window is None or window >= documents.longest else window
    if kind is AttentionKind.FLASH:
        return flash_backward(dout, q, k, v, out, saved, documents, scale=scale, window=window, over=over)
    if kind is AttentionKind.EFFICIENT:
        return efficient_backward(dout, q, k, v, out, saved, documents, scale=scale, window=window, over=over)
    if kind is AttentionKind.CUDNN:
        return cudnn_backward(dout, q, k, v, out, saved, documents, scale=scale, over=over)
    attend, at_once = _plain(kind, scale, window, softcap)
    return plain_backward(attend, dout, q, k, v, documents, rows_at_once=at_once)


def _plain(kind: AttentionKind, scale: float, window: int | None, softcap: float | None) -> tuple[Attend, bool]:
    """What a document goes through, and whether rows of one length go through it together."""
    if kind is AttentionKind.MATH:
        return written_out(scale, window, softcap), False
    return sdpa(scale, window), True


def _check(
    kind: AttentionKind,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    window: int | None,
    softcap: float | None,
) -> None:
    problems = []
    if q.shape[0] != documents.tokens or k.shape[0] != documents.tokens or k.shape != v.shape:
        problems.append(
            f"{documents.tokens} tokens in documents, q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.shape[1] % k.shape[1] or q.shape[2] != k.shape[2]:
        problems.append(f"heads of q {list(q.shape[1:])} and of k {list(k.shape[1:])} do not fit each other")
    if window is not None and window < 1:
        problems.append(f"a token sees itself, so a window is at least 1, not {window}")
    if softcap is not None and kind is not AttentionKind.MATH:
        problems.append(f"{kind.value} does not cap scores")
    if kind is AttentionKind.CUDNN and (documents.cu_seqlens is not None or window is not None):
        problems.append("cudnn takes rows of one length without a window")
    if problems:
        raise ValueError("; ".join(problems))
