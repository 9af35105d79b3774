"""A decoder layer as data: its frozen parts, its adapters, and what it keeps between forward and backward.

Families differ by what these values hold, never by code of their own; ``layer_forward`` and ``layer_backward`` are the
two functions that work on them, ``match`` reads them off transformers' modules.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from nbqlora.core.families import NormStyle
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.attention import AttentionKind, Documents
from nbqlora.engine.group import Group, Scratch
from nbqlora.kernels.glu import Activation
from nbqlora.kernels.rms_norm import rms_norm

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A frozen RMSNorm."""

    weight: torch.Tensor
    eps: float
    style: NormStyle

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The normed rows, and one over their root mean squares, fp32."""
        return rms_norm(x, self.weight, self.eps, style=self.style, out=out)


@dataclass(frozen=True, kw_only=True)
class Heads:
    """The attention's shape and what it does to scores.

    Args:
        scale: scores are multiplied by this.
        window: tokens that a token attends to, itself included; None for all before it.
        softcap: scores are ``softcap * tanh(scores / softcap)``; None for as they are.
        rotates: q and k carry rotary positions.
        normed: q and k are normed each ``head``, or over all heads (``full``); "" for not at all.
    """

    n: int
    n_kv: int
    dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    rotates: bool = True
    normed: str = ""

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.n * self.dim, self.n_kv * self.dim, self.n_kv * self.dim


@dataclass(frozen=True, kw_only=True)
class Call:
    """What one forward of the model hands to each of its layers.

    Args:
        cos, sin: ``[tokens, rotated dims]``.
        attention: chosen for this card, these heads and these documents.
    """

    documents: Documents
    cos: torch.Tensor
    sin: torch.Tensor
    attention: AttentionKind


@dataclass(kw_only=True)
class Layer:
    """A decoder layer.

    Args:
        attention_in, attention_out, mlp_in, mlp_out: norms before and behind its halves, None where there is none.
        residual_scale: what is added to the residual is multiplied by this (Granite).
        policy: what the forward keeps for the backward.
        slot: of the host memory, where the policy is to offload.
        joined_by_next: the next layer's input is computed again from this one's.
        opened: within it the frozen weights are there; they always are, unless they are split over cards.
    """

    qkv: Group
    o: Group
    gate_up: Group
    down: Group
    heads: Heads
    activation: Activation
    scratch: Scratch
    attention_in: Norm | None
    attention_out: Norm | None
    mlp_in: Norm | None
    mlp_out: Norm | None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    residual_scale: float = 1.0
    policy: LayerPolicy = field(default=LayerPolicy.KEEP)
    slot: int = 0
    joined_by_next: bool = False
    opened: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def groups(self) -> tuple[Group, Group, Group, Group]:
        """In the order of the forward."""
        return self.qkv, self.o, self.gate_up, self.down

    def tiles(self, tokens: int) -> list[slice]:
        """The rows that the MLP takes at once: all of them, unless it is computed again in tiles."""
        size = self.scratch.mlp_tile_tokens
        # A dropout's mask is drawn by place, and a tile would begin at the first one again.
        if not size or self.policy is LayerPolicy.KEEP or any(g.dropout_now for g in (self.gate_up, self.down)):
            return [slice(0, tokens)]
        return [slice(begin, min(begin + size, tokens)) for begin in range(0, tokens, size)]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All adapter parameters, each group's A matrices next to each other."""
        return [p for group in self.groups for p in group.parameters]

    def gate_and_up(self, buffers: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, torch.Tensor]:
        """The columns of both factors, whether two projections made them or one (Phi-3)."""
        f = self.down.n_in
        if len(buffers) == 1:
            return buffers[0][:, :f], buffers[0][:, f : 2 * f]
        return buffers[0][:, :f], buffers[1][:, :f]

    def q_k_v(self, joined: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views ``[tokens, heads, dim]`` of the projections' joined output ``[tokens, columns]``."""
        q, k, v = (part.unflatten(1, (-1, self.heads.dim)) for part in joined.split(self.heads.widths, dim=1))
        return q, k, v

    def norm_heads(self, x: torch.Tensor, norm: Norm) -> tuple[torch.Tensor, torch.Tensor]:
        """``[tokens, heads, dim]`` normed each, or over all heads; a new tensor."""
        if self.heads.normed == "head":
            return norm(x)
        y, rstd = norm(x.flatten(1))
        return y.unflatten(1, (-1, self.heads.dim)), rstd
