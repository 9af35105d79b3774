"""How many layers do what: the numbers that a plan searches over, and the order in which the layers stand.

First to last: layers that others join, each with those behind it, layers that offload, that recompute, that recompute
their MLP, that keep everything. What keeps the most stands last, because the backward frees it before it comes to the
layers that are computed again.

A group's inputs exist together in its backward, beside the inputs that recomputing layers before it keep. So where
these add up, the first groups are the larger ones: that way the most layers can have an input of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from nbqlora.core.specs import LayerPolicy


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Numbers of layers by policy.

    Args:
        tile_tokens: tokens that an MLP which is computed again takes at once; 0 for all.
    """

    keep: int = 0
    recompute_mlp: int = 0
    recompute: int = 0
    offload: int = 0
    join: int = 0
    tile_tokens: int = 0

    @property
    def n_layers(self) -> int:
        """All of them."""
        return self.keep + self.recompute_mlp + self.recompute + self.offload + self.join

    @property
    def n_whole(self) -> int:
        """Layers of which attention is computed again too."""
        return self.recompute + self.offload + self.join

    @property
    def groups(self) -> tuple[int, ...]:
        """Layers of each group, those of offloading heads first; a layer that nobody joins is a group of one."""
        return spread(self.offload, self.recompute, self.join)

    @property
    def policies(self) -> tuple[LayerPolicy, ...]:
        """Of each layer, first to last."""
        heads = (LayerPolicy.OFFLOAD,) * self.offload + (LayerPolicy.RECOMPUTE,) * self.recompute
        found: list[LayerPolicy] = []
        for head, size in zip(heads, self.groups, strict=True):
            found += [head, *[LayerPolicy.JOIN] * (size - 1)]
        return (*found, *[LayerPolicy.RECOMPUTE_MLP] * self.recompute_mlp, *[LayerPolicy.KEEP] * self.keep)

    def with_tiles(self, tokens: int) -> Mix:
        """The same layers, with MLPs in tiles."""
        return replace(self, tile_tokens=tokens)


def neighbours(mix: Mix) -> Iterator[Mix]:
    """The same with one layer of another policy."""
    for one in _COUNTS:
        if getattr(mix, one):
            for other in _COUNTS:
                moved = replace(mix, **{one: getattr(mix, one) - 1, other: getattr(mix, other) + 1})
                if other != one and (moved.recompute + moved.offload or not moved.join):
                    yield moved


_COUNTS = ("keep", "recompute_mlp", "recompute", "offload", "join")


def all_kept(n_layers: int) -> Mix:
    """Nothing is computed twice."""
    return Mix(keep=n_layers)


@lru_cache(maxsize=4096)
def spread(offload: int, recompute: int, join: int) -> tuple[int, ...]:
    """Sizes of the groups that so many heads make with so many layers that join.

    The inputs that exist in a group's backward are its own, and those of the recomputing heads before it; the most
    of these is as small as it can be.

    Raises:
        ValueError: there is nothing to join.
    """
    before = [*[0] * offload, *range(recompute)]
    if not join:
        return (1,) * len(before)
    if not before:
        raise ValueError("layers that join need one before them that keeps its input, or offloads it")
    level = _level(before, join)
    sizes, left = [], join
    for n in before:
        joining = min(left, max(0, level - n - 1))
        sizes.append(1 + joining)
        left -= joining
    return tuple(sizes)


def _level(before: Sequence[int], join: int) -> int:
    """The fewest inputs at once with which all layers find a group."""
    low, high = 1, before[-1] + 1 + join
    while low < high:
        middle = (low + high) // 2
        if sum(max(0, middle - n - 1) for n in before) >= join:
            high = middle
        else:
            low = middle + 1
    return low
