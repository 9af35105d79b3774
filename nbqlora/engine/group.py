"""Projections that share an input, as one: where their outputs, small products and gradients lie.

q, k and v read one normed input and lie side by side in one tensor, with one stacked A. gate and up read one too, but
each has a tensor of its own, so that one weight at a time is unpacked: together they would double the scratch memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.projection import NotMatchedError, Projection
from nbqlora.kernels.nf4 import Nf4
from nbqlora.memory.arena import DequantArena
from nbqlora.memory.host_slab import HostSlab

if TYPE_CHECKING:
    from nbqlora.engine.inputs import JoinedLayers


@dataclass
class Scratch:
    """What a product needs beside its operands; one for a model, filled when all its layers are known.

    Args:
        handed: the gradient that a layer's backward gave to the layer before it, with room behind each row.
        slab: host memory for the inputs of layers that offload.
        joined: the layers that the next one may join.
        mlp_tile_tokens: tokens that an MLP which is computed again handles at once; 0 for all.
    """

    arena: DequantArena
    adapters: FlatAdapters | None = None
    handed: torch.Tensor | None = None
    slab: HostSlab | None = None
    joined: JoinedLayers | None = None
    mlp_tile_tokens: int = 0

    def needed_adapters(self) -> FlatAdapters:
        """The adapters of a model that has some."""
        assert self.adapters is not None
        return self.adapters

    def needed_slab(self) -> HostSlab:
        """The host memory of a model that offloads."""
        assert self.slab is not None
        return self.slab

    def copy_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """An adapter's matrix in the products' dtype."""
        return self.needed_adapters().copy_of(parameter)

    def stacked_copy(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Several A matrices as one, in the products' dtype."""
        return self.needed_adapters().stacked_copy(parameters)


@dataclass
class Group:
    """Projections that share an input.

    Args:
        joined: their outputs, and the gradients of these, lie side by side in one tensor; then NF4 weights are
            unpacked together, for one matmul.
        reads_own: the input is written into a buffer of :meth:`input_buffer`, with room for u; otherwise it is
            somebody else's tensor (attention's, the activation's).
    """

    projections: Sequence[Projection]
    joined: bool
    reads_own: bool
    n_in: int = field(init=False)
    n_out: int = field(init=False)
    r: int = field(init=False)
    scale: float = field(init=False)
    quantized: bool = field(init=False)

    def __post_init__(self) -> None:
        self.n_in = self.projections[0].n_in
        self.n_out = sum(p.n_out for p in self.projections)
        self.r = sum(p.r for p in self.projections)
        loras = [p.lora for p in self.projections if p.lora]
        if len({x.scale for x in loras}) > 1 or len({getattr(x.dropout, "p", 0.0) for x in loras}) > 1:
            raise NotMatchedError("adapters on one input differ in scale or dropout")
        self.scale = loras[0].scale if loras else 1.0
        self.quantized = isinstance(self.projections[0].weight, Nf4)
        if any(isinstance(p.weight, Nf4) != self.quantized for p in self.projections):
            raise NotMatchedError("some of the linears on one input are quantized, others are not")

    @property
    def a_parameters(self) -> list[torch.nn.Parameter]:
        """The A matrices, in the order in which they are stacked."""
        return [p.lora.a for p in self.projections if p.lora]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All adapter parameters: the A matrices, then the B matrices."""
        return [*self.a_parameters, *(p.lora.b for p in self.projections if p.lora)]

    @property
    def dropout_now(self) -> float:
        """The dropout's probability in the present mode."""
        return next((p.lora.dropout_now for p in self.projections if p.lora), 0.0)

    @property
    def parts(self) -> list[list[Projection]]:
        """Projections by the tensor that holds their output."""
        return [list(self.projections)] if self.joined else [[p] for p in self.projections]

    @property
    def columns(self) -> list[tuple[slice, slice]]:
        """Each projection's columns in the joined output, and in u and v."""
        found, n, r = [], 0, 0
        for p in self.projections:
            found.append((slice(n, n + p.n_out), slice(r, r + p.r)))
            n, r = n + p.n_out, r + p.r
        return found

    def scratch_elements(self) -> int:
        """Elements of the largest unpacked weight, with B's columns or A's rows."""
        if not self.quantized:
            return 0
        sizes = [(sum(p.n_out for p in part), sum(p.r for p in part)) for part in self.parts]
        return max(max(n * (self.n_in + self.r), (n + r) * self.n_in) for n, r in sizes)

    def input_buffer(self, like: torch.Tensor) -> torch.Tensor:
        """``[tokens, n_in + r]``: its first ``n_in`` columns are to be filled with the input."""
        return torch.empty(like.shape[0], self.n_in + self.r, dtype=like.dtype, device=like.device)

    def output_buffers(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[tokens, n_out]`` for each part, with ``r`` further columns where the matmul itself finds u."""
        return self._buffers(like, room=not self.reads_own)

    def gradient_buffers(self, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """``[tokens, n_out]`` for each part, with ``r`` further columns for v where there is one part."""
        return self._buffers(like, room=self.joined)

    def _buffers(self, like: torch.Tensor, *, room: bool) -> tuple[torch.Tensor, ...]:
        widths = [sum(p.n_out for p in part) + (self.r if room else 0) for part in self.parts]
        return tuple(torch.empty(like.shape[0], w, dtype=like.dtype, device=like.device) for w in widths)

    def split(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Each projection's output in the buffers of its part."""
        if not self.joined:
            return [b[:, : p.n_out] for b, p in zip(buffers, self.projections, strict=True)]
        return [buffers[0][:, n] for n, _ in self.columns]
