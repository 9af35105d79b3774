"""What exists at a moment of a walk through a layer's statements, and the parts that both halves of a layer have."""

from __future__ import annotations

from nbqlora.planner import references as ref
from nbqlora.planner.fused import FusedLayer


class Live:
    """What exists at this moment of a walk, by name, and the most that ever did."""

    def __init__(self) -> None:
        self._held: dict[str, int] = {}
        self._now = self.peak = 0

    def hold(self, **sizes: int) -> None:
        """These exist from now on."""
        for name, size in sizes.items():
            self._held[name] = self._held.get(name, 0) + size
            self._now += size
        self.peak = max(self.peak, self._now)

    def drop(self, *names: str) -> None:
        """These are gone, those of them that were there."""
        self._now -= sum(self._held.pop(name, 0) for name in names)

    def brief(self, size: int) -> None:
        """So much exists for a moment."""
        self.peak = max(self.peak, self._now + size)


def input_of(layer: FusedLayer, live: Live, group: str, norm: str) -> None:
    """A group's input as ``read``, normed if there is a ``norm``."""
    live.hold(read=layer.rows(layer.d + layer.r[group]))
    if norm:
        live.brief(ref.norm(layer, layer.d))


def product(layer: FusedLayer, live: Live, group: str) -> None:
    """A product's own: the weight as bitsandbytes unpacks it, and the input of adapters that drop."""
    live.brief(layer.unpacked_bytes(group))
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(layer.rows(width) + ref.dropout(layer, width))


def gradient_product(layer: FusedLayer, live: Live, group: str) -> None:
    """A gradient's product: as above; with dropout, what came through the adapters, and that dropped."""
    live.brief(layer.unpacked_bytes(group))
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(2 * layer.rows(width) + ref.dropout(layer, width))


def adapter_gradients(layer: FusedLayer, live: Live, group: str) -> None:
    """Gradients of a group's adapters: with dropout, their input dropped once more."""
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(layer.rows(width) + ref.dropout(layer, width))


def branch(layer: FusedLayer, live: Live, norm: str) -> None:
    """The residual's gradient, scaled and brought through the branch's norm."""
    live.hold(scaled=layer.rows(layer.d) if layer.family.scales_residual else 0)
    if norm:
        live.brief(ref.norm_backward(layer, layer.d))
    live.drop("scaled")


def through_norm(layer: FusedLayer, live: Live, norm: str, r: int) -> None:
    """A norm's backward, which writes what the norm wrote once more, for adapters of rank ``r``."""
    if norm:
        live.hold(read=layer.rows(layer.d) if r else 0)
        live.brief(ref.norm_backward(layer, layer.d, with_residual=True))
