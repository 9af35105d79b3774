"""Weights that are split over cards: each has a share of every decoder layer, and gathers a layer when its turn comes.

Only the packed bytes of 4-bit weights are split, nine tenths of a large model. FSDP2 does it (``fully_shard``): the
bytes of a layer lie end to end in the one frozen parameter of a module that is never called, so that none of FSDP's
hooks fires. The fused layers ask for them, by its public ``unshard`` and ``reshard``: a layer's backward is one node of
autograd that recomputes what it needs, and knows better than a hook when its weights are read.

A pass is a forward, with its backward where it trains. Each of its gathers is one of all ranks, so every rank begins as
many, in the same order: the layers up, and down again to the first that trains. While a layer is at work the next one
is on its way: there are its bytes, and those that are coming. The last layer stays from its forward to its backward. A
rank whose pass broke off takes part in what is left of it, for the others wait (:meth:`ShardedWeights.catch_up`).

The parameter is fp32: any bits come through a copy as they are. In bf16 they do not: FSDP copies a share with
``torch._foreach_copy_``, which on a card goes through fp32 and back and makes one NaN of all (torch 2.6 to 2.13,
``ForeachBinaryOpList.cu``; pairs of bytes that are a NaN are common). Some of these versions refuse integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from nbqlora.core.errors import ModelError
from nbqlora.engine.layer import Layer
from nbqlora.kernels.nf4 import Nf4

# Where a model keeps its shares: an attribute of the instance, no submodule, so that no state dict has them.
ATTRIBUTE = "_nbqlora_shards"
ELEMENT = torch.float32
# Bytes between the beginnings of two weights: a kernel that reads words and vectors compiles as for whole weights.
ALIGNED = 16
CLOSED = (
    "this model's weights are split over several cards, and only training and evaluation gather them; "
    "to talk to the model or to look at its weights, load its adapter in one process, or merge it"
)


class _Holder(torch.nn.Module):
    """What FSDP splits; it has no forward."""

    def __init__(self, packed: torch.Tensor) -> None:
        super().__init__()
        self.packed = torch.nn.Parameter(packed.view(ELEMENT), requires_grad=False)


class ShardedLayer:
    """The 4-bit weights of one decoder layer, of which this card has a share.

    Args:
        linears: bitsandbytes' ``Linear4bit`` by name, anywhere; their packed bytes are taken from them, and they are
            given them again while the layer is open.
        mesh: of all ranks, on the device that is to hold the share.
        device: this rank's part of it.
    """

    def __init__(self, linears: Mapping[str, Any], mesh: Any, device: torch.device) -> None:
        from torch.distributed.fsdp import fully_shard

        self._linears, self._places, end = dict(linears), dict[str, slice](), 0
        for name, linear in linears.items():
            self._places[name] = slice(end, end + linear.weight.data.nbytes)
            end += -(-linear.weight.data.nbytes // ALIGNED) * ALIGNED
        flat = torch.zeros(end, dtype=torch.uint8, device=device)
        for name, linear in linears.items():
            flat[self._places[name]].copy_(linear.weight.data.view(-1).view(torch.uint8))
        self._nothing = torch.empty(0, dtype=torch.uint8, device=device)
        self._attached: dict[str, Nf4] = {}
        self._holder: Any = fully_shard(_Holder(flat), mesh=mesh)
        self._coming: Any = None
        self._bind(None)
        for linear in linears.values():
            linear.register_forward_pre_hook(_refuse_closed)

    @property
    def share(self) -> torch.Tensor:
        """What this card holds while the layer is closed."""
        found: torch.Tensor = self._holder.packed.to_local()
        return found

    def attach(self, layer: Layer) -> None:
        """Open and close the weights of this fused layer too."""
        found = {p.name: p.weight for group in layer.groups for p in group.projections if isinstance(p.weight, Nf4)}
        if found.keys() != self._linears.keys():
            raise ModelError(f"split were {', '.join(self._linears)}; the fused layer reads {', '.join(found)}")
        self._attached = found

    def gather(self) -> None:
        """Ask for the other shares, without waiting for them; once more where there was no room for them."""
        if self._coming is None:
            self._coming = self._holder.unshard(async_op=True)

    def open(self) -> None:
        """Wait for what was asked for, and put the weights where they are read."""
        self._coming.wait()
        self._coming = None
        self._bind(self._holder.packed.detach().view(torch.uint8))

    def close(self) -> None:
        """Free all but the share."""
        self._bind(None)
        self._holder.reshard()

    def _bind(self, whole: torch.Tensor | None) -> None:
        for name, linear in self._linears.items():
            packed = self._nothing if whole is None else whole[self._places[name]]
            linear.weight.data = packed.view(-1, 1)
            if name in self._attached:
                self._attached[name].packed = packed


class ShardedWeights:
    """The decoder layers of a model, first to last, and whose turn it is."""

    def __init__(self, layers: Sequence[ShardedLayer]) -> None:
        self.layers = tuple(layers)
        # The first layer whose backward runs; behind the last one where none does.
        self.trains_from = 0
        # Begun so far; the same on all ranks when each has caught up.
        self.passes = 0
        self._turns: tuple[int, ...] = ()
        self._gathered = self._taken = 0
        self._open: int | None = None
        self._stays: int | None = None

    def begin_pass(self, *, trains: bool) -> None:
        """Before a forward; what an earlier one left is finished.

        Args:
            trains: a backward follows.
        """
        self.finish_pass()
        n, last = len(self.layers), len(self.layers) - 1
        down = range(last - 1, self.trains_from - 1, -1) if trains else ()
        self._turns, self._gathered, self._taken = (*range(n), *down), 0, 0
        self._stays = last if trains and self.trains_from <= last else None
        self.passes += 1
        self._gather_next()

    def finish_pass(self) -> None:
        """Take part in the gathers that are left of the pass that is under way."""
        self._stays = None
        self._close()
        while self._taken < len(self._turns):
            self._take()
            self._close()

    def catch_up(self, passes: int, *, trains: bool) -> None:
        """Take part in everything that ranks gather up to the end of this pass, counted from the first.

        Where there is no room for it, memory has to be given back, and this called again.
        """
        self.finish_pass()
        while self.passes < passes:
            self.begin_pass(trains=trains)
            self.finish_pass()

    @contextmanager
    def opened(self, place: int) -> Iterator[None]:
        """Within, this layer's weights are there; the next one's are on their way.

        Raises:
            RuntimeError: it is another layer's turn.
        """
        if self._open == place:  # the last one, between its forward and its backward
            self._stays = None
        else:
            if self._turns[self._taken : self._taken + 1] != (place,):
                raise RuntimeError(f"layer {place} was asked for out of turn, as {self._taken} of {self._turns}")
            self._take()
            self._gather_next()
        try:
            yield
        finally:
            if self._stays != place:
                self._close()

    @contextmanager
    def alone(self, place: int) -> Iterator[None]:
        """Within, this layer's weights are there, outside of any pass; on all ranks at the same time."""
        self.finish_pass()
        layer = self.layers[place]
        layer.gather()
        layer.open()
        try:
            yield
        finally:
            layer.close()

    def _gather_next(self) -> None:
        if self._gathered < len(self._turns) and self._gathered == self._taken:
            self.layers[self._turns[self._gathered]].gather()
            self._gathered += 1

    def _take(self) -> None:
        self._gather_next()  # where there was no room to do it ahead
        place = self._turns[self._taken]
        self.layers[place].open()
        self._open, self._taken = place, self._taken + 1

    def _close(self) -> None:
        if self._open is not None:
            self.layers[self._open].close()
        self._open = None


def shards_of(model: Any) -> ShardedWeights | None:
    """The split weights of a model, if they are split."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: ShardedWeights | None = base.__dict__.get(ATTRIBUTE)
    return found


def shard(model: Any, layers: Iterable[Mapping[str, Any]], device: torch.device) -> ShardedWeights:
    """Split the weights of these layers over all ranks, one layer after the other, and hang them on the model.

    Args:
        model: transformers' model, before it has adapters.
        layers: of each layer, first to last, ``Linear4bit`` by name; the next one is asked for when the one before is
            split.
        device: where this rank's shares go.
    """
    from torch.distributed.device_mesh import DeviceMesh

    group = dist.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, device.type)
    weights = ShardedWeights([ShardedLayer(linears, mesh, device) for linears in layers])
    model.__dict__[ATTRIBUTE] = weights
    return weights


def check_whole(model: Any) -> None:
    """Before anything but training and evaluation.

    Raises:
        ModelError: the model's weights are split over cards.
    """
    if shards_of(model) is not None:
        raise ModelError(CLOSED)


def _refuse_closed(linear: Any, args: Any) -> None:
    """A forward that is not ours reads a weight that is not there: kernels would read whatever is at address 0."""
    if linear.weight.numel() == 0:
        raise ModelError(CLOSED)
