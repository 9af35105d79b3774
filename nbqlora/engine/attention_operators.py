"""Operators of attention that torch keeps private: whether this torch's can be called, and how they take q, k and v.

They are what torch's own ``scaled_dot_product_attention`` calls, and they take what it does not pass on: boundaries of
documents, read on the device, so that a captured step may change them between replays; and a window, as a keyword of
the *backward* too. Torch's derivative of the memory-efficient operator drops the window: gradients through autograd are
silently wrong there.

Private means that arguments change. They are compared by name with what is used (:func:`lacks`) before an operator is
chosen; torch 2.6 to 2.13 differ in two names. Dropout is 0: the state of random numbers is passed on, and not read.
"""

from __future__ import annotations

from typing import Any

import torch

from nbqlora.engine.attention_documents import Documents

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# Arguments by operator, in order, then keywords; "a|b" stands for either name.
_FLASH = {
    "_flash_attention_forward": (
        "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask",
        "scale window_size_left window_size_right",
    ),
    "_flash_attention_backward": (
        "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal "
        "rng_state|philox_seed unused|philox_offset",
        "scale window_size_left window_size_right",
    ),
}
_EFFICIENT = {
    "_efficient_attention_forward": (
        "query key value bias cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p custom_mask_type "
        "compute_log_sumexp",
        "scale window_size",
    ),
    "_efficient_attention_backward": (
        "grad_out_ query key value bias out cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k logsumexp dropout_p "
        "philox_seed philox_offset custom_mask_type bias_requires_grad",
        "scale num_splits_key window_size",
    ),
}
_CUDNN = {
    "_scaled_dot_product_cudnn_attention": (
        "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask",
        "scale",
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k "
        "dropout_p is_causal",
        "scale",
    ),
}
OPERATORS = {"flash": _FLASH, "memory-efficient": _EFFICIENT, "cuDNN": _CUDNN}


def lacks(family: str) -> str:
    """Why this torch's operators of a family cannot be called as they are called here; "" where they can."""
    for name, (positional, keywords) in OPERATORS[family].items():
        schema = schema_of(name)
        if schema is None:
            return f"this torch has no private operator {name}"
        if not _takes(schema, positional.split(), keywords.split()):
            return f"this torch's private operator takes other arguments ({name})"
    return ""


def schema_of(name: str) -> Any:
    """Schema of one of torch's operators, None where there is no such operator."""
    packet = getattr(torch.ops.aten, name, None)
    return None if packet is None else packet.default._schema


def _takes(schema: Any, positional: list[str], keywords: list[str]) -> bool:
    """These in this order, these by name, and nothing else that has to be given."""
    ordered = [a.name for a in schema.arguments if not a.kwarg_only]
    named = {a.name for a in schema.arguments if a.kwarg_only}
    known = len(ordered) >= len(positional) and all(
        name in wanted.split("|") for name, wanted in zip(ordered, positional, strict=False)
    )
    given = {*ordered[: len(positional)], *keywords}
    return known and named >= {*keywords} and all(a.has_default_value() or a.name in given for a in schema.arguments)


def operator(name: str) -> Any:
    """The operator itself."""
    return getattr(torch.ops.aten, name).default


def rows(x: torch.Tensor, documents: Documents) -> torch.Tensor:
    """``[tokens, heads, dim]`` as ``[rows, seq, heads, dim]``; as one row where there are boundaries."""
    return x.unflatten(0, (documents.rows if documents.cu_seqlens is None else 1, -1))


def aligned(x: torch.Tensor) -> torch.Tensor:
    """The tensor itself where a kernel can read it 16 bytes at a time, else a copy."""
    width = 16 // x.element_size()
    whole = x.stride(-1) == 1 and all(s % width == 0 for s in x.stride()[:-1]) and x.data_ptr() % 16 == 0
    return x if whole else x.contiguous()
