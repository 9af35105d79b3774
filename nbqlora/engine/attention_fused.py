"""Attention by flash, for documents of any length or rows of one, and by cuDNN, for rows of one length.

Both let heads share keys and values. Flash keeps one fp32 a token and head. Its backward holds dq in fp32, and 128
tokens more of it for each document, those of no tokens included: 2 MiB a document with 32 heads of 128 (read in the
sources of torch 2.13).
"""

from __future__ import annotations

import torch

from nbqlora.engine.attention_documents import Documents
from nbqlora.engine.attention_operators import Gradients, aligned, operator, rows


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
) -> Gradients:
    """Gradients of q, k and v."""
    lse, *rng = saved
    dq, dk, dv = operator("_flash_attention_backward")(
        _batched(dout, documents),
        *(aligned(_batched(x, documents)) for x in (q, k, v)),
        _batched(out, documents),
        lse,
        *_flash_boundaries(documents),
        0.0,
        True,
        *rng,
        scale=scale,
        **_flash_window(window),
    )
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)


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
) -> Gradients:
    """Gradients of q, k and v."""
    dout, q4, k4, v4, out = (rows(aligned(x), documents).transpose(1, 2) for x in (dout, q, k, v, out))
    dq, dk, dv = operator("_scaled_dot_product_cudnn_attention_backward")(
        dout, q4, k4, v4, out, *saved, None, None, None, documents.seq, documents.seq, 0.0, True, scale=scale
    )
    dq, dk, dv = (x.transpose(1, 2) for x in (dq, dk, dv))
    return dq.reshape(q.shape), dk.reshape(k.shape), dv.reshape(v.shape)
