"""What a captured step is made of: its shape, the tensors that a replay reads, the graphs, and their stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from nbqlora.engine.attention import Documents
from nbqlora.engine.head import IGNORED


@dataclass(frozen=True)
class Shape:
    """What a graph was captured for. ``n_documents`` is 0 where each row is one document."""

    rows: int
    seq: int
    n_documents: int
    max_tokens: int


@dataclass
class Inputs:
    """The tensors that a replay reads, on the card."""

    ids: torch.Tensor
    positions: torch.Tensor
    boundaries: torch.Tensor | None
    places: torch.Tensor
    targets: torch.Tensor
    factor: torch.Tensor


@dataclass
class Graphs:
    """One shape's graphs, and where they put results."""

    forward: torch.cuda.CUDAGraph
    chunk: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    inputs: Inputs
    loss: torch.Tensor
    gradient: torch.Tensor


@cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The one stream of a device that graphs are captured on.

    A new stream a run would leave a handle of cuBLAS, and what it holds, behind after each.
    """
    return torch.cuda.Stream(device, priority=-1)


def documents_of_shape(shape: Shape, boundaries: torch.Tensor | None) -> Documents:
    """The documents that a graph of this shape attends over."""
    return Documents(rows=shape.rows, seq=shape.seq, cu_seqlens=boundaries, max_tokens=shape.max_tokens, lengths=None)


def fill(inputs: Inputs, batch: dict[str, torch.Tensor], factor: torch.Tensor) -> None:
    """Put a batch where the graphs read it."""
    inputs.ids.copy_(batch["input_ids"])
    inputs.positions.copy_(batch["position_ids"])
    if inputs.boundaries is not None:
        inputs.boundaries.copy_(batch["boundaries"])
    inputs.factor.copy_(factor)


def fill_chunk(inputs: Inputs, places: torch.Tensor, targets: torch.Tensor) -> None:
    """A chunk's places and targets, filled up with a place behind the last token and no target."""
    n, last = places.numel(), inputs.ids.numel()
    inputs.places[:n] = places
    inputs.targets[:n] = targets
    if n < inputs.places.numel():
        inputs.places[n:] = last
        inputs.targets[n:] = IGNORED
