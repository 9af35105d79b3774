"""Most bytes that exist at once in a fused layer's forward and backward: a walk through the engine's statements.

Each function here stands for the one of the same name in ``engine.layer_forward`` and ``engine.layer_backward``, and
holds and drops what that one does, in its order. What a layer kept stays until its backward is over, because autograd
holds it; what was recomputed is dropped as it is used up. A test follows every tensor of the real functions.
"""

from __future__ import annotations

from nbqlora.core.specs import LayerPolicy
from nbqlora.planner import references as ref
from nbqlora.planner.fused import FusedLayer
from nbqlora.planner.live import Live, adapter_gradients, gradient_product, input_of, product, through_norm
from nbqlora.planner.walk_mlp import (
    between,
    leave_mlp,
    make_gate_up,
    mlp_backward,
    mlp_backward_in_tiles,
    mlp_in_tiles,
    mlp_whole,
)


def forward_peak(layer: FusedLayer, policy: LayerPolicy = LayerPolicy.KEEP, tile_tokens: int = 0) -> int:
    """Bytes beyond the layer's input, with all that it keeps.

    Args:
        tile_tokens: of an MLP that is computed again; 0 for all.
    """
    live = Live()
    _attend(layer, live)
    if policy is not LayerPolicy.KEEP and tile_tokens:
        mlp_in_tiles(layer, live, policy, tile_tokens)
        return live.peak
    mlp_whole(layer, live)
    return live.peak


def backward_peak(layer: FusedLayer, policy: LayerPolicy, *, last: bool, tile_tokens: int = 0) -> int:
    """Bytes beyond what the policy kept, with the gradient that comes.

    Args:
        last: no layer stands behind this one, so that its gradient comes without room behind each row.
        tile_tokens: of an MLP that is computed again; 0 for all.
    """
    live = Live()
    live.hold(gradient=layer.rows(layer.d + (0 if last else layer.r["down"])))
    if policy is LayerPolicy.KEEP:
        mlp_backward(layer, live, last, own=False)
    elif tile_tokens:
        if policy is not LayerPolicy.RECOMPUTE_MLP:
            _attend(layer, live)
            live.hold(whole=layer.rows(layer.d))
            live.drop("attended")
        mlp_backward_in_tiles(layer, live, last, tile_tokens)
    else:
        if policy is LayerPolicy.RECOMPUTE_MLP:
            input_of(layer, live, "gate_up", layer.family.mlp_in)
        else:
            _attend(layer, live)
            between(layer, live)
            live.drop("attended")
        make_gate_up(layer, live)
        mlp_backward(layer, live, last, own=True)
    leave_mlp(layer, live)
    _attention_backward(layer, live, fresh=policy not in (LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP))
    return live.peak


def _attend(layer: FusedLayer, live: Live) -> None:
    """Leaves what the output projection or its norm made as ``attended``."""
    tensors, family = layer.tensors, layer.family
    input_of(layer, live, "qkv", family.attention_in)
    live.hold(qkv=tensors["qkv"], u_qkv=tensors["u_qkv"])
    product(layer, live, "qkv")
    live.drop("read")
    _rotated(layer, live, fresh=True)
    live.hold(attention=tensors["attention"], attention_0=tensors["attention_0"])
    live.brief(layer.attended.forward_bytes)
    live.hold(attended=layer.rows(layer.d + layer.r["o"]), u_o=tensors["u_o"])
    product(layer, live, "o")
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


def _attention_backward(layer: FusedLayer, live: Live, *, fresh: bool) -> None:
    """``fresh``: q, k and v were computed again; groups of heads then write their gradients over them."""
    d, r, family = layer.d, layer.r, layer.family
    over = fresh and layer.attended.groups > 1
    live.hold(flat=layer.rows(layer.q))
    gradient_product(layer, live, "o")
    adapter_gradients(layer, live, "o")
    live.drop("u_o")
    _rotated(layer, live, fresh=False)
    live.hold(found=0 if over else layer.rows(layer.qkv))
    live.brief(layer.attended.backward_bytes)
    live.drop("flat", "attention", "attention_0", *(() if over else ("normed_heads",)))
    live.hold(gradients=layer.rows(layer.qkv + r["qkv"]))
    live.brief(ref.rope(layer))
    if family.qk_norm:
        live.brief(max(layer.rows(layer.q), ref.norm_backward(layer, layer.q)))
    live.drop("found", "qkv", "normed_heads")
    live.hold(inner=layer.rows(d))
    gradient_product(layer, live, "qkv")
    live.hold(handed=layer.rows(d + r["down"]))
    through_norm(layer, live, family.attention_in, r["qkv"])
    adapter_gradients(layer, live, "qkv")
