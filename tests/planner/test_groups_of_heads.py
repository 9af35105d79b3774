"""The memory-efficient backward in groups of heads: the plan's bytes against all tensors that exist, on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes

from nbqlora.core.specs import BatchLayout
from nbqlora.engine import attention_efficient, attention_groups
from nbqlora.engine.attention import AttentionKind
from nbqlora.planner import attention
from nbqlora.planner.attention import Attended, Kernel
from tests.engine import attention_fakes
from tests.planner.test_fused_layer import ROWS, SEQ, Both, check_backward, make

__all__ = ["make"]  # fixture
HEAD_DIM = 32


def forward(q: torch.Tensor, *args: Any, **how: Any) -> tuple[Any, ...]:
    """What the operator returns exists, and nothing else of how it is computed here."""
    with _disable_current_modes():
        out, lse, *rest = attention_fakes.efficient_forward(q, *args, **how)
    return out.clone(), lse.clone(), *rest


def backward(dout: torch.Tensor, q: torch.Tensor, *args: Any, **how: Any) -> tuple[torch.Tensor, ...]:
    """Three gradients, dq in fp32 at each document's longest length, and a sum for each log-sum-exp."""
    lse = args[8]
    assert lse.dim() == 3
    found = [torch.empty_like(q) for _ in range(3)]
    longest = q.shape[1] if args[4] is None else args[6]
    at_work = torch.empty(lse.shape[0], longest, *q.shape[2:], dtype=torch.float32), torch.empty_like(lse)
    with _disable_current_modes():
        exact = attention_fakes.efficient_backward(dout, q, *args, **how)
        for whole, part in zip(found, exact, strict=False):
            whole.copy_(part)
    del at_work
    return *found, torch.empty(0)


FAKES = {"_efficient_attention_forward": forward, "_efficient_attention_backward": backward}


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Callable[[Both, int], Both]:
    """A layer whose attention is the memory-efficient one, with room for so many heads of k at once."""
    monkeypatch.setattr(attention_efficient, "operator", FAKES.__getitem__)

    def made(both: Both, heads: int) -> Both:
        attended = replace(both.planned.attended, kernel=Kernel.EFFICIENT)
        group = attended.q // attended.kv
        limit = 4 * attended.documents * attended.longest * HEAD_DIM * group * heads
        monkeypatch.setattr(attention_groups, "WORKSPACE_BYTES", limit)
        monkeypatch.setattr(attention, "WORKSPACE_BYTES", limit)
        both.planned = replace(both.planned, attended=attended)
        both.real.call = replace(both.real.call, attention=AttentionKind.EFFICIENT)
        return both

    return made


SLOW = pytest.mark.slow
CASES = [
    ("llama", BatchLayout.PADDED, 1, 4),
    ("qwen3", BatchLayout.JOINED, 2, 2),
    pytest.param("llama", BatchLayout.JOINED, 4, 1, marks=SLOW),
    pytest.param("qwen3", BatchLayout.PADDED, 4, 1, marks=SLOW),
    pytest.param("phi3", BatchLayout.PADDED, 1, 4, marks=SLOW),
]


@pytest.mark.parametrize("family,layout,heads,groups", CASES)
def test_a_layers_backward(
    family: str, layout: BatchLayout, heads: int, groups: int, make: Any, on_a_card: Any, one_thread: None
) -> None:
    shape = {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 256}
    both = on_a_card(make(family, layout=layout, **shape), heads)
    assert both.planned.attended.groups == groups
    check_backward(both)
    check_backward(both, tile=128)


@pytest.mark.parametrize("kernel", [Kernel.EFFICIENT, Kernel.FLASH, Kernel.CUDNN])
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_fewer_heads_at_once_take_less(kv_heads: int, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    how: dict[str, Any] = {
        "kernel": kernel, "q": 8 * HEAD_DIM, "kv": kv_heads * HEAD_DIM, "head_dim": HEAD_DIM, "tokens": ROWS * SEQ,
        "documents": ROWS, "longest": SEQ, "dense": True, "window": False, "on_card": True, "c": 2,
    }  # fmt: skip
    planned, whole = Attended(**how), 4 * ROWS * SEQ * 8 * HEAD_DIM
    gradients, taken = (planned.q + 2 * planned.kv) * planned.c * planned.tokens, []
    for share in (1, 2, 4, 8):
        monkeypatch.setattr(attention, "WORKSPACE_BYTES", whole // share)
        assert planned.groups == min(share, kv_heads)
        # Those of one group are written over q, k and v.
        taken.append(planned.backward_bytes + (gradients if planned.groups == 1 else 0))
    different = taken[: kv_heads.bit_length()]
    assert different == sorted(different, reverse=True) and different[-1] < 0.7 * different[0]
    assert set(taken) == set(different)
