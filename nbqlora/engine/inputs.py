"""Where a layer's input comes from in the backward: kept, brought back from the host, or computed again.

Layers that join keep no input. They form a group with the nearest layer before them that has one: when the backward
reaches the group's last layer, the forwards of the group are run again from the first one's input, and each layer's
input is there until its own backward took it. A group of g layers stores one input instead of g, and costs g - 1
forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.layer import Call, Layer, Tensors
from nbqlora.engine.layer_forward import layer_forward


@dataclass
class JoinedLayers:
    """Layers whose inputs come from that of the first.

    Args:
        first: gives the first layer's input ``[tokens, d_model]``; let go of once it was called.
    """

    first: Callable[[], torch.Tensor] | None
    _forwards: list[Callable[[torch.Tensor], torch.Tensor]] = field(default_factory=list)
    _inputs: list[torch.Tensor] = field(default_factory=list)

    def add(self, layer: Layer, call: Call, seeds: Tensors) -> int:
        """One more layer; returns its place."""
        self._forwards.append(lambda x: layer_forward(layer, x, call, seeds=seeds)[0])
        return len(self._forwards) - 1

    def input_of(self, place: int) -> torch.Tensor:
        """A layer's input, to be taken from the last layer to the first; those before it are made on the way."""
        if not self._inputs:
            if self.first is None:
                raise RuntimeError("the inputs of layers that join are there for one backward")
            self._inputs, self.first = [self.first()], None
            for forward in self._forwards[:place]:
                self._inputs.append(forward(self._inputs[-1]))
        return self._inputs.pop()


@dataclass
class Stored:
    """How one layer's input is found again; made in its forward.

    Args:
        group: the layers that it joins or that join it; None for one that stands alone and kept its input.
    """

    group: JoinedLayers | None = None
    place: int = 0

    def find(self, kept: Tensors) -> None:
        """Put ``x`` into ``kept`` if it is not there."""
        if self.group is not None:
            kept["x"] = self.group.input_of(self.place)


def store_input(layer: Layer, call: Call, kept: Tensors, *, need_input: bool) -> Stored:
    """After a layer's forward: do with its input what its policy says.

    Args:
        kept: what the forward kept; the input is taken out of it where the policy says so.
        need_input: the layers before this one train too.
    """
    scratch = layer.scratch
    if layer.policy in (LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP):
        scratch.joined = None
        return Stored()
    seeds = {name: t for name, t in kept.items() if name.startswith("seed_")}
    if layer.policy is LayerPolicy.JOIN:
        if scratch.joined is None:
            raise ValueError("a layer that joins needs one before it that keeps its input, or offloads it")
        del kept["x"]
    elif layer.policy is LayerPolicy.OFFLOAD:
        del kept["x"]
        scratch.joined = JoinedLayers(_from_host(layer, need_input))
    elif layer.joined_by_next:
        x = kept.pop("x")
        scratch.joined = JoinedLayers(lambda: x)
    else:
        scratch.joined = None
        return Stored()
    group = scratch.joined
    return Stored(group, group.add(layer, call, seeds))


def _from_host(layer: Layer, need_input: bool) -> Callable[[], torch.Tensor]:
    slab, slot = layer.scratch.needed_slab(), layer.slot
    return lambda: slab.take(slot, more=need_input)


def send_input(layer: Layer, x: torch.Tensor) -> None:
    """Before a layer's forward: what is leaving for the host has left, and this one sets out if it is to."""
    slab = layer.scratch.slab
    if slab is not None:
        slab.settle()
        if layer.policy is LayerPolicy.OFFLOAD:
            slab.store(layer.slot, x)
