"""Most bytes that exist at once in a fused layer's forward and backward: a walk through the engine's statements.

Each function here stands for the one of the same name in ``engine.layer_forward`` and ``engine.layer_backward``, and
holds and drops what that one does, in its order. What a layer kept stays until its backward is over, because autograd
holds it; what was recomputed is dropped as it is used up. A test follows every tensor of the real functions.
"""

from __future__ import annotations

from nbqlora.core.specs import LayerPolicy
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


def forward_peak(layer: FusedLayer) -> int:
    """Bytes beyond the layer's input, with all that it keeps."""
    live = Live()
    _attend(layer, live)
    _between(layer, live)
    live.hold(gate_up=layer.rows(2 * layer.f))
    _gate_up(layer, live)
    live.drop("read")
    _down(layer, live)
    if layer.family.mlp_out:
        live.drop("active")
        live.hold(normed=layer.rows(layer.d))
        live.brief(ref.norm(layer, layer.d))
    live.hold(out=layer.rows(layer.d))
    live.brief(0 if layer.family.mlp_out else ref.low_rank_add(layer, layer.d))
    return live.peak


def backward_peak(layer: FusedLayer, policy: LayerPolicy, *, last: bool) -> int:
    """Bytes beyond what the policy kept, with the gradient that comes.

    Args:
        last: no layer stands behind this one, so that its gradient comes without room behind each row.
    """
    live = Live()
    live.hold(gradient=layer.rows(layer.d + (0 if last else layer.r["down"])))
    if policy is not LayerPolicy.KEEP:
        _recompute(layer, live, policy)
    _mlp_backward(layer, live, last, own=policy is not LayerPolicy.KEEP)
    _attention_backward(layer, live)
    return live.peak


def _recompute(layer: FusedLayer, live: Live, policy: LayerPolicy) -> None:
    if policy is LayerPolicy.RECOMPUTE:
        _attend(layer, live)
        _between(layer, live)
    else:
        _input_of(layer, live, "gate_up", layer.family.mlp_in)
    _gate_up_gradients(layer, live, "gate_up")
    _gate_up(layer, live)
    if layer.family.mlp_out:
        _down(layer, live)
    live.drop("read", "active")


def _attend(layer: FusedLayer, live: Live) -> None:
    """Leaves what the output projection or its norm made as ``attended``."""
    tensors, family = layer.tensors, layer.family
    _input_of(layer, live, "qkv", family.attention_in)
    live.hold(qkv=tensors["qkv"], u_qkv=tensors["u_qkv"])
    _product(layer, live, "qkv")
    live.drop("read")
    _rotated(layer, live, fresh=True)
    live.hold(attention=tensors["attention"], attention_0=tensors["attention_0"])
    live.brief(layer.attended.forward_bytes)
    live.hold(attended=layer.rows(layer.d + layer.r["o"]), u_o=tensors["u_o"])
    _product(layer, live, "o")
    if family.attention_out:  # what is normed is kept
        live.drop("attended")
        live.hold(o=tensors["o"], attended=layer.rows(layer.d))
        live.brief(ref.norm(layer, layer.d))
    live.drop("normed_heads")


def _rotated(layer: FusedLayer, live: Live, *, fresh: bool) -> None:
    if layer.family.qk_norm:
        live.hold(normed_heads=layer.rows(layer.q + layer.attended.kv))
        live.brief(ref.norm(layer, layer.q))
    if fresh or layer.family.qk_norm:
        live.brief(ref.rope(layer))


def _between(layer: FusedLayer, live: Live) -> None:
    live.hold(read=layer.rows(layer.d + layer.r["gate_up"]), between=layer.tensors["between"])
    if layer.family.mlp_in:
        live.brief(ref.norm(layer, layer.d, with_sum=True))
    live.drop("attended")


def _input_of(layer: FusedLayer, live: Live, group: str, norm: str) -> None:
    live.hold(read=layer.rows(layer.d + layer.r[group]))
    if norm:
        live.brief(ref.norm(layer, layer.d))


def _gate_up(layer: FusedLayer, live: Live) -> None:
    live.hold(u_gate_up=layer.tensors["u_gate_up"])
    _product(layer, live, "gate_up")


def _gate_up_gradients(layer: FusedLayer, live: Live, name: str) -> None:
    room = layer.r["gate_up"] if layer.joined_gate_up else 0
    live.hold(**{name: layer.rows(2 * layer.f + room)})


def _down(layer: FusedLayer, live: Live) -> None:
    live.hold(active=layer.rows(layer.f))
    live.brief(ref.glu(layer))
    live.hold(down=layer.rows(layer.d + layer.r["down"]), u_down=layer.tensors["u_down"])
    _product(layer, live, "down")


def _product(layer: FusedLayer, live: Live, group: str) -> None:
    """A product's own: the weight as bitsandbytes unpacks it, and the input of adapters that drop."""
    live.brief(layer.unpacked_bytes(group))
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(layer.rows(width) + ref.dropout(layer, width))


def _gradient_product(layer: FusedLayer, live: Live, group: str) -> None:
    """A gradient's product: as above; with dropout, what came through the adapters, and that dropped."""
    live.brief(layer.unpacked_bytes(group))
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(2 * layer.rows(width) + ref.dropout(layer, width))


def _adapter_gradients(layer: FusedLayer, live: Live, group: str) -> None:
    if layer.dropout and layer.r[group]:
        _, width, _ = layer.group(group)[0]
        live.brief(layer.rows(width) + ref.dropout(layer, width))


def _mlp_backward(layer: FusedLayer, live: Live, last: bool, *, own: bool) -> None:
    d, r, family = layer.d, layer.r, layer.family
    if last or family.mlp_out or family.scales_residual:
        live.hold(at_down=layer.rows(d + r["down"]))
        _branch(layer, live, family.mlp_out)
        live.drop("down")
    live.hold(hidden=layer.rows(layer.f))
    _gradient_product(layer, live, "down")
    if not own:
        _gate_up_gradients(layer, live, "gradients")
    live.brief(ref.glu_backward(layer))
    _adapter_gradients(layer, live, "down")
    live.drop("hidden", "at_down", "u_down")
    beside = layer.quantized and not layer.joined_gate_up
    live.hold(inner=layer.rows(d + (r["gate_up"] if beside else 0)))
    live.hold(v=layer.rows(0 if beside or layer.joined_gate_up else r["gate_up"]))
    _gradient_product(layer, live, "gate_up")
    live.hold(at_o=layer.rows(d + r["o"]))
    _through_norm(layer, live, family.mlp_in, r["gate_up"])
    _adapter_gradients(layer, live, "gate_up")
    live.drop("read", "v", "u_gate_up", "between")
    if family.attention_out or family.scales_residual:
        _branch(layer, live, family.attention_out)
        live.drop("o")
    else:
        live.drop("inner")
    live.drop("gradients", "gate_up")  # views of its halves hold it so long


def _branch(layer: FusedLayer, live: Live, norm: str) -> None:
    """The residual's gradient, scaled and brought through the branch's norm."""
    live.hold(scaled=layer.rows(layer.d) if layer.family.scales_residual else 0)
    if norm:
        live.brief(ref.norm_backward(layer, layer.d))
    live.drop("scaled")


def _through_norm(layer: FusedLayer, live: Live, norm: str, r: int) -> None:
    """A norm's backward, which writes what the norm wrote once more, for adapters of rank ``r``."""
    if norm:
        live.hold(read=layer.rows(layer.d) if r else 0)
        live.brief(ref.norm_backward(layer, layer.d, with_residual=True))


def _attention_backward(layer: FusedLayer, live: Live) -> None:
    d, r, family = layer.d, layer.r, layer.family
    live.hold(flat=layer.rows(layer.q))
    _gradient_product(layer, live, "o")
    _adapter_gradients(layer, live, "o")
    live.drop("u_o")
    _rotated(layer, live, fresh=False)
    live.hold(found=layer.rows(layer.qkv))
    live.brief(layer.attended.backward_bytes)
    live.drop("normed_heads", "flat", "attention", "attention_0")
    live.hold(gradients=layer.rows(layer.qkv + r["qkv"]))
    live.brief(ref.rope(layer))
    if family.qk_norm:
        live.brief(max(layer.rows(layer.q), ref.norm_backward(layer, layer.q)))
    live.drop("found", "qkv")
    live.hold(inner=layer.rows(d))
    _gradient_product(layer, live, "qkv")
    live.hold(handed=layer.rows(d + r["down"]))
    _through_norm(layer, live, family.attention_in, r["qkv"])
    _adapter_gradients(layer, live, "qkv")
