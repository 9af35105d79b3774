"""Attention's backward over groups of heads, one after the other, where all at once would take much memory.

The operators hold dq in fp32, and the gradients of keys and values for every head of q; with long rows that is several
times q itself. Heads do not know of each other, so a group of them is a call of its own, whose share of all that is
gone when the next one begins. What stays are the gradients; where q, k and v are not needed any more, each group's are
written over its own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from nbqlora.engine.attention_operators import Gradients

# What a backward may take for dq in fp32, which is not kept.
WORKSPACE_BYTES = 2**28


def kv_heads_at_once(q: torch.Tensor, k: torch.Tensor, padded_tokens: int) -> int:
    """Heads of k whose part of the workspace fits; all of them where rows are short.

    Args:
        padded_tokens: for which the operator holds dq in fp32.
    """
    a_head = padded_tokens * q.shape[2] * 4 * (q.shape[1] // k.shape[1])
    return min(k.shape[1], max(1, WORKSPACE_BYTES // a_head))


def in_groups(
    work: Callable[[slice, slice], Gradients],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    at_once: int,
    over: bool,
) -> Gradients:
    """Gradients of q, k and v, from those of the groups.

    Args:
        work: of these heads of q, and of k and v.
        at_once: heads of k in a group.
        over: where there are several groups, gradients are written over q, k and v.
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    if at_once >= kv_heads:
        return work(slice(None), slice(None))
    dq, dk, dv = (x if over else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for begin in range(0, kv_heads, at_once):
        kv, own = slice(begin, begin + at_once), slice(begin * group, (begin + at_once) * group)
        dq[:, own], dk[:, kv], dv[:, kv] = work(own, kv)
    return dq, dk, dv
