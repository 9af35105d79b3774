"""The MLP half of a fused layer, forward and backward, statement by statement, whole or a tile of tokens at a time.

Each function stands for the one of the same name in ``engine.layer_forward`` and ``engine.layer_backward``.
"""

from __future__ import annotations

from dataclasses import replace

from nbqlora.core.specs import LayerPolicy
from nbqlora.planner import references as ref
from nbqlora.planner.fused import FusedLayer
from nbqlora.planner.live import (
    Live,
    adapter_gradients,
    branch,
    gradient_product,
    input_of,
    product,
    through_norm,
)


def mlp_whole(layer: FusedLayer, live: Live) -> None:
    """All tokens at once, with all that is kept of them."""
    between(layer, live)
    live.drop("attended")
    live.hold(gate_up=layer.rows(2 * layer.f))
    _gate_up(layer, live)
    live.drop("read")
    _down(layer, live)
    live.hold(out=layer.rows(layer.d))
    _onto(layer, live)


def mlp_in_tiles(layer: FusedLayer, live: Live, policy: LayerPolicy, tile_tokens: int) -> None:
    """The second tile: what is kept of all of them is there by then."""
    tile = replace(layer, tokens=min(tile_tokens, layer.tokens))
    live.hold(out=layer.rows(layer.d), u_down=layer.tensors["u_down"])
    live.hold(whole=layer.tensors["between"] if policy is LayerPolicy.RECOMPUTE_MLP else 0)
    between(tile, live)
    live.hold(gate_up=tile.rows(2 * tile.f))
    _gate_up(tile, live)
    live.drop("read")
    _down(tile, live)
    _onto(tile, live)


def _onto(layer: FusedLayer, live: Live) -> None:
    """The residual, with what the MLP adds to it, where there is room for it."""
    if layer.family.mlp_out:
        live.drop("active")
        live.hold(normed=layer.rows(layer.d))
        live.brief(ref.norm(layer, layer.d))
    else:
        live.brief(ref.low_rank_add(layer, layer.d))


def between(layer: FusedLayer, live: Live) -> None:
    """The residual between the halves, and as ``read`` what the MLP reads of it."""
    live.hold(read=layer.rows(layer.d + layer.r["gate_up"]), between=layer.tensors["between"])
    if layer.family.mlp_in:
        live.brief(ref.norm(layer, layer.d, with_sum=True))


def _gate_up(layer: FusedLayer, live: Live) -> None:
    live.hold(u_gate_up=layer.tensors["u_gate_up"])
    product(layer, live, "gate_up")


def _gate_up_gradients(layer: FusedLayer, live: Live, name: str) -> None:
    room = layer.r["gate_up"] if layer.joined_gate_up else 0
    live.hold(**{name: layer.rows(2 * layer.f + room)})


def _down(layer: FusedLayer, live: Live) -> None:
    live.hold(active=layer.rows(layer.f))
    live.brief(ref.glu(layer))
    live.hold(down=layer.rows(layer.d + layer.r["down"]), u_down=layer.tensors["u_down"])
    product(layer, live, "down")


def make_gate_up(layer: FusedLayer, live: Live) -> None:
    """Gate and up once more, from ``read``, with room for the small gradients."""
    _gate_up_gradients(layer, live, "gate_up")
    _gate_up(layer, live)
    if layer.family.mlp_out:
        _down(layer, live)
    live.drop("read", "active")


def mlp_backward_in_tiles(layer: FusedLayer, live: Live, last: bool, tile_tokens: int) -> None:
    """One tile: nothing of it is left when the next begins; what comes from a layer of ours is written over."""
    tile, d = replace(layer, tokens=min(tile_tokens, layer.tokens)), layer.d
    over = _direct(layer) and not last and layer.r["o"] == layer.r["down"]
    live.hold(at_o=0 if over else layer.rows(d + layer.r["o"]), middle=0 if _direct(layer) else layer.rows(d))
    input_of(tile, live, "gate_up", tile.family.mlp_in)
    make_gate_up(tile, live)
    mlp_backward(tile, live, last, own=True, at_o=False)
    live.drop("whole", "inner", "gate_up")


def mlp_backward(layer: FusedLayer, live: Live, last: bool, *, own: bool, at_o: bool = True) -> None:
    """Gradients down to the residual between the halves.

    Args:
        own: gate and up are new, and written over.
        at_o: the gradient of what attention added is made here.
    """
    d, r, family = layer.d, layer.r, layer.family
    if last or family.mlp_out or family.scales_residual:
        live.hold(at_down=layer.rows(d + r["down"]))
        branch(layer, live, family.mlp_out)
        live.drop("down")
    live.hold(hidden=layer.rows(layer.f))
    gradient_product(layer, live, "down")
    if not own:
        _gate_up_gradients(layer, live, "gradients")
    live.brief(ref.glu_backward(layer))
    adapter_gradients(layer, live, "down")
    live.drop("hidden", "at_down", "u_down")
    beside = layer.quantized and not layer.joined_gate_up
    live.hold(inner=layer.rows(d + (r["gate_up"] if beside else 0)))
    live.hold(v=layer.rows(0 if beside or layer.joined_gate_up else r["gate_up"]))
    gradient_product(layer, live, "gate_up")
    live.hold(at_o=layer.rows(d + r["o"]) if at_o else 0)
    through_norm(layer, live, family.mlp_in, r["gate_up"])
    adapter_gradients(layer, live, "gate_up")
    live.drop("read", "v", "u_gate_up", "between")


def leave_mlp(layer: FusedLayer, live: Live) -> None:
    """Of the MLP's half the residual's gradient stays, in a tensor of its own where attention's is another."""
    live.drop("gradients", "gate_up")
    if _direct(layer):
        live.drop("inner")
    else:
        branch(layer, live, layer.family.attention_out)
        live.drop("o")


def _direct(layer: FusedLayer) -> bool:
    """What attention adds to the residual has the residual's gradient."""
    return not (layer.family.attention_out or layer.family.scales_residual)
