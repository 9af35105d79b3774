"""The mix of layers that takes the least of the card: what is looked at where nothing else fits."""

from __future__ import annotations

from collections.abc import Iterator

from nbqlora.planner.estimate import Memory
from nbqlora.planner.limits import Limits
from nbqlora.planner.mix import Mix, neighbours


def leanest(memory: Memory, n_layers: int, limits: Limits) -> Mix:
    """The mix that takes the least of the card, within what the host has."""
    mix, slots = lean(memory, n_layers, limits), slots_of(memory, n_layers, limits)
    while True:
        best = min((m for m in near(mix, memory) if m.offload <= slots), key=memory.total_bytes)
        if memory.total_bytes(best) >= memory.total_bytes(mix):
            return mix
        mix = best


def lean(memory: Memory, n_layers: int, limits: Limits) -> Mix:
    """:func:`leanest` to a percent, in less time."""
    slots = slots_of(memory, n_layers, limits)
    tile = memory.tiles[-1] if memory.tiles else 0
    if not memory.joins:
        return Mix(recompute=n_layers - slots, offload=slots, tile_tokens=tile)
    if slots == n_layers:
        # Joining and staying here may spare a little of what the last layers keep.
        few = min(n_layers, 3)
        mixes = [joining_mix(n_layers, joining, n_layers - here, tile) for joining in range(few) for here in range(few)]
    else:
        step = -(-n_layers // 16)
        coarse = min((joining_mix(n_layers, n, slots, tile) for n in range(0, n_layers, step)), key=memory.total_bytes)
        # One input more or less is a few percent where rows are long.
        around = range(max(0, coarse.join - step + 1), min(n_layers, coarse.join + step))
        mixes = [joining_mix(n_layers, n, slots, tile) for n in around]
    return min(mixes, key=memory.total_bytes)


def near(mix: Mix, memory: Memory) -> Iterator[Mix]:
    """Neighbours that such layers can be."""
    for found in neighbours(mix):
        if (memory.mlp_alone or not found.recompute_mlp) and (memory.joins or not found.join):
            yield found


def slots_of(memory: Memory, n_layers: int, limits: Limits) -> int:
    """Layers whose input the host has room for."""
    return min(n_layers, limits.host_bytes // memory.input_bytes)


def joining_mix(n_layers: int, n_join: int, slots: int, tile: int) -> Mix:
    """So many layers that join, the others with their input on the host as far as there is room."""
    offload = min(slots, n_layers - n_join)
    return Mix(recompute=n_layers - n_join - offload, offload=offload, join=n_join, tile_tokens=tile)
