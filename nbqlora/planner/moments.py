"""The moments at which a stack of layers may hold the most, for any mix of policies, by a few sums.

Layers of one policy are alike, so of each policy only its last layer's forward and its first two layers' backwards can
be the peak: the first has the most stored behind it; before the second a gradient has come that has room behind its
rows, and that a captured step holds a second time. A test goes through all layers one by one instead.

What is where: a layer that offloads has its input on the card while it computes, in the forward; in the backward with
the next one that comes. A group's inputs are made from the first when the backward reaches its last layer, and each is
there until its own layer's backward is over.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbqlora.core.specs import LayerPolicy
from nbqlora.planner.fused import FusedLayer
from nbqlora.planner.mix import Mix
from nbqlora.planner.walk import backward_peak, forward_peak

KEEP, MLP, RECOMPUTE = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
OFFLOAD, JOIN = LayerPolicy.OFFLOAD, LayerPolicy.JOIN


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """One layer, with its MLP whole or in tiles.

    Args:
        x: bytes of its input.
        stored: bytes on the card between its forward and its backward, by policy.
        forward: bytes of its forward beyond its input, by policy.
        backward: bytes of its backward beyond what is kept and its input, with the gradient that comes, by policy and
            whether it is the model's last layer.
        gradient: bytes of the gradient that comes to it from the layer behind it.
    """

    x: int
    stored: Mapping[LayerPolicy, int]
    forward: Mapping[LayerPolicy, int]
    backward: Mapping[tuple[LayerPolicy, bool], int]
    gradient: int


def layer_bytes(layer: FusedLayer, tile_tokens: int, behind: int) -> LayerBytes:
    """A layer's bytes.

    Args:
        tile_tokens: of an MLP that is computed again; 0 for all.
        behind: bytes that a captured step holds beyond the last layer's backward.
    """
    own = {p: p if p in (KEEP, MLP) else RECOMPUTE for p in LayerPolicy}
    forward = {p: forward_peak(layer, p, tile_tokens) for p in (KEEP, MLP, RECOMPUTE)}
    backward = {
        (p, last): backward_peak(layer, p, last=last, tile_tokens=tile_tokens) + (0 if last else behind)
        for p in (KEEP, MLP, RECOMPUTE)
        for last in (True, False)
    }
    return LayerBytes(
        x=layer.tensors["x"],
        stored={p: layer.stored_bytes(p) for p in LayerPolicy},
        forward={p: forward[own[p]] for p in LayerPolicy},
        backward={(p, last): backward[own[p], last] for p in LayerPolicy for last in (True, False)},
        gradient=layer.rows(layer.d + layer.r["down"]) + behind,
    )


def moments(layer: LayerBytes, mix: Mix) -> tuple[int, int]:
    """Bytes that are stored when all layers have run, and the most that forward and backward take."""
    stored, working, left = 0, 0, mix.n_layers
    alone: list[tuple[LayerPolicy, int]] = [(MLP, mix.recompute_mlp), (KEEP, mix.keep)]
    if mix.join:
        stored, working = _in_groups(layer, mix)
        left -= mix.n_whole
    else:
        alone = [(OFFLOAD, mix.offload), (RECOMPUTE, mix.recompute), *alone]
    for policy, n in alone:
        if not n:
            continue
        left -= n
        stored += n * layer.stored[policy]
        below = stored - layer.stored[policy]
        working = max(
            working,
            below + layer.x + layer.forward[policy],
            stored + _fetched(layer, policy, n) + layer.backward[policy, not left],
        )
        if n > 1 and not left:
            working = max(working, below + _fetched(layer, policy, n - 1) + layer.backward[policy, False])
    return stored, working


def _fetched(layer: LayerBytes, policy: LayerPolicy, n: int) -> int:
    """Inputs of the ``n`` layers up to this one that have come back from the host: its own, and the next one's."""
    return layer.x * min(n, 2) if policy is OFFLOAD else 0


def _in_groups(layer: LayerBytes, mix: Mix) -> tuple[int, int]:
    """As :func:`moments`, of the layers that join and are joined."""
    x, joined, forward = layer.x, layer.stored[JOIN], layer.forward[JOIN]
    backward, last = layer.backward[JOIN, False], layer.backward[JOIN, True]
    stored, working, left = 0, 0, mix.n_layers
    for i, size in enumerate(mix.groups):
        offloads = i < mix.offload
        left -= size
        own = layer.stored[OFFLOAD if offloads else RECOMPUTE]
        stored += own + (size - 1) * joined
        inputs = (min(i + 1, 2) if offloads else 0) * x + (size - 1) * x
        top = joined if size > 1 else own
        found = max(stored - top + x + forward, stored + inputs + (backward if left else last))
        if size > 1:  # the forwards that run again, of which the last makes the last input
            found = max(found, stored + inputs - x + (layer.gradient if left else x) + forward)
            if not left:
                found = max(found, stored - joined + inputs - x + backward)
        working = max(working, found)
    return stored, working
