"""A decoder layer's backward, from what its forward kept.

Adapters' gradients are added straight to their flat buffer. A layer that recomputes makes all that it dropped at once,
writes gate's and up's gradients over their values (where rows are long, also those of q, k and v), and lets go of each
tensor when it was used; what a layer kept, its autograd node holds until the end.
"""

from __future__ import annotations

import torch

from nbqlora.engine.attention import attention_backward
from nbqlora.engine.group import Group
from nbqlora.engine.layer import Call, Layer, Norm, Tensors
from nbqlora.engine.layer_forward import input_of, recompute, recompute_mlp, rotated
from nbqlora.engine.lora_backward import add_adapter_gradients, backward_product
from nbqlora.kernels.glu import glu_backward
from nbqlora.kernels.rms_norm import rms_norm_backward
from nbqlora.kernels.rope import rope


def layer_backward(
    layer: Layer, gradient: torch.Tensor, kept: Tensors, call: Call, *, need_input: bool
) -> torch.Tensor | None:
    """Gradient of the output -> gradient of the input, both ``[tokens, d_model]``.

    Args:
        kept: what :func:`layer_forward` kept; it is used up.
        need_input: False where nothing before the layer trains.

    Returns:
        None if it was not needed; its rows may lie further apart than ``d_model``, with room for what the layer before
        puts behind them.
    """
    tiles, fresh = layer.tiles(gradient.shape[0]), "qkv" not in kept
    own = recompute(layer, call, kept, mlp=len(tiles) == 1)
    middle, at_o = _mlp_half(layer, gradient, kept, own, tiles)
    return _attention_backward(layer, middle, at_o, kept, call, need_input, fresh)


def _mlp_half(
    layer: Layer, gradient: torch.Tensor, kept: Tensors, own: bool, tiles: list[slice]
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Gradient of the layer's output -> of the residual between the halves, and of what attention added to it."""
    d = gradient.shape[1]
    direct = layer.attention_out is None and layer.residual_scale == 1.0
    if len(tiles) == 1:
        at_o, middle = _mlp_backward(layer, gradient, kept, own, None, direct)
    else:
        at_o, middle = _mlp_backward_in_tiles(layer, gradient, kept, tiles, direct)
    if not direct:
        _fill_branch(layer, middle, layer.attention_out, kept.pop("o", None), at_o[0][:, :d])
    return middle, at_o


def _mlp_backward_in_tiles(
    layer: Layer, gradient: torch.Tensor, kept: Tensors, tiles: list[slice], direct: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """As :func:`_mlp_backward`, gate and up made again and used up tile by tile.

    Where the gradient that comes is a tensor that the layer behind made, each tile's result is written over its own.
    """
    scratch, handed = layer.scratch, layer.scratch.handed
    over = direct and handed is not None and _is_body(gradient, handed, layer.o)
    at_o = (handed,) if over and handed is not None else layer.o.gradient_buffers(gradient)
    middle = at_o[0][:, : gradient.shape[1]] if direct else torch.empty_like(gradient)
    between, u_down = kept.pop("between"), kept.pop("u_down", None)
    for rows in tiles:
        tile: Tensors = {"between": between[rows]} | ({} if u_down is None else {"u_down": u_down[rows]})
        recompute_mlp(layer, input_of(layer.gate_up, between[rows], layer.mlp_in), tile)
        scratch.handed = None if handed is None else handed[rows]
        _mlp_backward(layer, gradient[rows], tile, True, middle[rows], direct)
    return at_o, middle


def _mlp_backward(
    layer: Layer, gradient: torch.Tensor, kept: Tensors, own: bool, middle: torch.Tensor | None, direct: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Gradient of the layer's output -> buffers for that of what attention added, and that of the residual between.

    Args:
        middle: where the latter goes; None where it goes into the buffers' first columns, if it is ``direct``, or into
            a tensor that is there anyway. With it, no buffers are made.
        direct: both are the same.
    """
    d, scratch, seed = gradient.shape[1], layer.scratch, kept.get("seed_3")
    at_down = _branch_gradient(layer, layer.down, gradient, layer.mlp_out, kept.pop("down", None))
    hidden, v = backward_product(layer.down, at_down, scratch, seed)
    assert hidden is not None
    buffers = tuple(kept.pop(f"gate_up_{i}") for i in range(len(layer.gate_up.parts)))
    gate, up = layer.gate_and_up(buffers)
    gradients = buffers if own else layer.gate_up.gradient_buffers(hidden)
    d_gate, d_up = layer.gate_and_up(gradients)
    # The activation's value is written over its gradient, for the adapter of the down projection.
    glu_backward(hidden, gate, up, activation=layer.activation, dgate=d_gate, dup=d_up, h=hidden)
    del buffers, gate, up
    add_adapter_gradients(layer.down, at_down, v, hidden, kept.pop("u_down", None), scratch, seed)
    del hidden, at_down, v
    seed = kept.get("seed_2")
    inner, v = backward_product(layer.gate_up, gradients, scratch, seed)
    assert inner is not None
    at_o: tuple[torch.Tensor, ...] = ()
    out = middle
    if out is None:
        at_o = layer.o.gradient_buffers(gradient)
        out = at_o[0][:, :d] if direct else inner
    u = kept.pop("u_gate_up", None)
    found, read = _through_norm(inner, kept.pop("between"), layer.mlp_in, gradient, out=out, want_read=u is not None)
    add_adapter_gradients(layer.gate_up, gradients, v, read, u, scratch, seed)
    return at_o, found


def _attention_backward(
    layer: Layer,
    gradient: torch.Tensor,
    at_o: tuple[torch.Tensor, ...],
    kept: Tensors,
    call: Call,
    need_input: bool,
    fresh: bool,
) -> torch.Tensor | None:
    """Gradient of the residual between the halves -> gradient of the layer's input; ``fresh`` q, k, v are used up."""
    scratch, seed, d = layer.scratch, kept.get("seed_1"), gradient.shape[1]
    flat, v = backward_product(layer.o, at_o, scratch, seed)
    assert flat is not None
    attended = kept.pop("attention")
    add_adapter_gradients(layer.o, at_o, v, attended, kept.pop("u_o", None), scratch, seed)
    joined = kept.pop("qkv")
    of_attention = _of_attention(layer, flat, joined, attended, kept, call, over=fresh)
    del flat, attended
    gradients = layer.qkv.gradient_buffers(gradient)
    _gradients_of_projections(layer, of_attention, joined, call, gradients[0])
    del of_attention, joined
    seed = kept.get("seed_0")
    inner, v = backward_product(layer.qkv, gradients, scratch, seed, need_input=need_input)
    u = kept.pop("u_qkv", None)
    if inner is None:
        read = kept["x"] if layer.attention_in is None else layer.attention_in(kept["x"])[0]
        add_adapter_gradients(layer.qkv, gradients, v, read, u, scratch, seed)
        return None
    scratch.handed = layer.down.gradient_buffers(gradient)[0]
    out = scratch.handed[:, :d]
    found, read = _through_norm(inner, kept["x"], layer.attention_in, gradient, out=out, want_read=u is not None)
    add_adapter_gradients(layer.qkv, gradients, v, read, u, scratch, seed)
    return found


def _of_attention(
    layer: Layer,
    outer: torch.Tensor,
    joined: torch.Tensor,
    attended: torch.Tensor,
    kept: Tensors,
    call: Call,
    *,
    over: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradient of attention's result -> of rotated q and k, and of v; ``over`` these, where it saves room."""
    h = layer.heads
    q, k, v = rotated(layer, joined, call, fresh=False)
    rest = tuple(kept.pop(f"attention_{i}") for i in range(sum(n.startswith("attention_") for n in kept)))
    dout, out = (t.unflatten(1, (-1, h.dim)) for t in (outer, attended))
    how = {"scale": h.scale, "window": h.window, "softcap": h.softcap, "over": over}
    return attention_backward(call.attention, dout, q, k, v, out, rest, call.documents, **how)  # type: ignore[arg-type]


def _branch_gradient(
    layer: Layer, group: Group, gradient: torch.Tensor, norm: Norm | None, normed: torch.Tensor | None
) -> tuple[torch.Tensor, ...]:
    """Gradient of the residual -> gradient of what a projection added to it, with room for the small gradient.

    The layer behind left room behind its gradient: where that is the tensor at hand, nothing is copied.
    """
    handed, layer.scratch.handed = layer.scratch.handed, None
    direct = norm is None and layer.residual_scale == 1.0
    if direct and handed is not None and _is_body(gradient, handed, group):
        return (handed,)
    buffers = group.gradient_buffers(gradient)
    _fill_branch(layer, gradient, norm, normed, buffers[0][:, : gradient.shape[1]])
    return buffers


def _is_body(gradient: torch.Tensor, whole: torch.Tensor, group: Group) -> bool:
    """Whether ``gradient`` is the first columns of ``whole``, whose others are v's."""
    same = whole.data_ptr() == gradient.data_ptr() and whole.stride() == gradient.stride()
    return same and whole.shape == (gradient.shape[0], group.n_out + group.r)


def _fill_branch(
    layer: Layer, gradient: torch.Tensor, norm: Norm | None, normed: torch.Tensor | None, out: torch.Tensor
) -> None:
    """Gradient of the residual -> of what was added to it, through the branch's norm if it has one."""
    scaled = gradient * layer.residual_scale if layer.residual_scale != 1.0 else gradient
    if norm is None:
        out.copy_(scaled)
    else:
        assert normed is not None
        rms_norm_backward(scaled, normed, norm.weight, style=norm.style, eps=norm.eps, out=out)


def _through_norm(
    inner: torch.Tensor,
    x: torch.Tensor,
    norm: Norm | None,
    residual: torch.Tensor,
    *,
    out: torch.Tensor,
    want_read: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient of a norm's output -> of its input, with the residual's added, into ``out``.

    Returns:
        That, and the norm's output once more, which was not kept and comes from the same pass, if wanted (else x).
    """
    if norm is None:
        return torch.add(inner, residual, out=out), x
    read = torch.empty_like(x) if want_read else None
    rms_norm_backward(
        inner, x, norm.weight, style=norm.style, residual_grad=residual, out=out, eps=norm.eps, y_out=read
    )
    return out, x if read is None else read


def _gradients_of_projections(
    layer: Layer, found: tuple[torch.Tensor, ...], joined: torch.Tensor, call: Call, out: torch.Tensor
) -> None:
    """Gradients of rotated q and k, and of v -> of the projections' joined output, in the first columns of ``out``."""
    dq, dk, dv = found
    q_out, k_out, v_out = layer.q_k_v(out[:, : sum(layer.heads.widths)])
    if layer.q_norm and layer.k_norm:
        if layer.heads.rotates:
            rope(dq, dk, call.cos, call.sin, q_out=dq, k_out=dk, inverse=True)
        q, k, _ = layer.q_k_v(joined)
        _head_norm_backward(layer, dq, q, layer.q_norm, q_out)
        _head_norm_backward(layer, dk, k, layer.k_norm, k_out)
        v_out.copy_(dv)
    elif layer.heads.rotates:
        rope(dq, dk, call.cos, call.sin, q_out=q_out, k_out=k_out, inverse=True, v=dv, v_out=v_out)
    else:
        for part, gradient in zip((q_out, k_out, v_out), found, strict=True):
            part.copy_(gradient)


def _head_norm_backward(layer: Layer, dy: torch.Tensor, x: torch.Tensor, norm: Norm, out: torch.Tensor) -> None:
    if layer.heads.normed == "full":
        dy, x = dy.flatten(1), x.flatten(1)
    out.copy_(rms_norm_backward(dy, x, norm.weight, style=norm.style, eps=norm.eps).view(out.shape))
