"""A decoder layer's forward, by hand, because autograd keeps every operand.

What a Llama layer keeps, in units of its width and the dtype: its input (1), q, k, v (1.5), attention's result (1),
the residual between the halves (1), gate and up (7): 11.5 in all, where autograd on the same modules keeps 18. Norms
and the activation are computed again in the backward, from their inputs; the frozen matmuls need nothing; the adapters
keep their small products.

A policy keeps less: all but gate and up, or the input alone. What is computed again stops before the down
projection, whose result nobody asks for a second time: a quarter of a layer's matmuls. Where an MLP is computed again,
it may run in tiles of tokens, so that gate and up exist for one tile at a time.
"""

from __future__ import annotations

import torch

from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.attention import attention_forward
from nbqlora.engine.group import Group
from nbqlora.engine.layer import Call, Layer, Norm, Tensors
from nbqlora.engine.lora_blocks import project, project_onto
from nbqlora.kernels.glu import glu
from nbqlora.kernels.rms_norm import rms_norm
from nbqlora.kernels.rope import rope

# What each policy drops, by the beginnings of names. The small product of the down projection always stays: it would
# cost that projection's input again.
ALL = ("gate_up", "u_gate_up", "down", "qkv", "u_qkv", "attention", "o", "u_o", "between")
DROPPED = {
    LayerPolicy.KEEP: (),
    LayerPolicy.RECOMPUTE_MLP: ("gate_up", "u_gate_up", "down"),
    LayerPolicy.RECOMPUTE: ALL,
    LayerPolicy.OFFLOAD: ALL,
    LayerPolicy.JOIN: ALL,
}


def layer_forward(
    layer: Layer, x: torch.Tensor, call: Call, *, seeds: Tensors | None = None
) -> tuple[torch.Tensor, Tensors]:
    """The layer's output, and what its policy keeps; the input among it, whatever the policy.

    Args:
        x: ``[tokens, d_model]``.
        seeds: of the dropout, where the forward is run once more; drawn when None.

    Returns:
        ``[tokens, d_model]``, and tensors by name.
    """
    kept: Tensors = {"x": x, **(_seeds(layer, x) if seeds is None else seeds)}
    attended = attend(layer, call, kept)
    tiles = layer.tiles(x.shape[0])
    if len(tiles) > 1:
        out = _mlp_in_tiles(layer, x, attended, tiles, kept)
    else:
        read = between(layer, x, attended, kept)
        del attended
        buffers = layer.gate_up.output_buffers(x)
        gate_up(layer, read, buffers, kept)
        del read
        out = down_onto(layer, buffers, kept)
    dropped = DROPPED[layer.policy]
    return out, {name: t for name, t in kept.items() if not dropped or not name.startswith(dropped)}


def _mlp_in_tiles(
    layer: Layer, x: torch.Tensor, attended: torch.Tensor, tiles: list[slice], kept: Tensors
) -> torch.Tensor:
    """The MLP half, a tile of tokens at a time: ``[tokens, d_model]``; what the policy keeps of it is put together."""
    out = torch.empty_like(x)
    whole: Tensors = {}
    for rows in tiles:
        tile: Tensors = {}
        read = between(layer, x[rows], attended[rows], tile)
        buffers = layer.gate_up.output_buffers(read)
        gate_up(layer, read, buffers, tile)
        del read
        down_onto(layer, buffers, tile, out=out[rows])
        del buffers
        for name in ("between", "u_down"):
            if name in tile and not name.startswith(DROPPED[layer.policy]):
                if name not in whole:
                    whole[name] = tile[name].new_empty(x.shape[0], tile[name].shape[1])
                whole[name][rows] = tile[name]
    kept |= whole
    return out


def recompute(layer: Layer, call: Call, kept: Tensors, *, mlp: bool = True) -> bool:
    """Put back what the policy dropped; whether gate and up are new, so that they may be written over.

    Args:
        mlp: False leaves gate and up to :func:`recompute_mlp`, tile by tile.
    """
    if "gate_up_0" in kept:
        return False
    if "between" not in kept:
        attended = attend(layer, call, kept)
        if not mlp:
            kept["between"] = torch.add(kept["x"], attended, alpha=layer.residual_scale)
            return True
        read = between(layer, kept["x"], attended, kept)
        del attended
        recompute_mlp(layer, read, kept)
    elif mlp:
        recompute_mlp(layer, input_of(layer.gate_up, kept["between"], layer.mlp_in), kept)
    return True


def recompute_mlp(layer: Layer, read: torch.Tensor, kept: Tensors) -> None:
    """Gate and up from the MLP's input, made by :func:`input_of`."""
    # With room for the small gradients: gate's and up's own gradients are written over them.
    buffers = layer.gate_up.gradient_buffers(read)
    gate_up(layer, read, buffers, kept)
    if layer.mlp_out:
        kept["down"] = down(layer, buffers, kept)


def attend(layer: Layer, call: Call, kept: Tensors) -> torch.Tensor:
    """Attention on the layer's input ``kept["x"]``, through its output projection and norm: ``[tokens, d_model]``."""
    x, h = kept["x"], layer.heads
    read = input_of(layer.qkv, x, layer.attention_in)
    joined = layer.qkv.output_buffers(x)
    _keep(kept, "u_qkv", project(layer.qkv, read, joined, layer.scratch, kept.get("seed_0")))
    del read
    kept["qkv"] = joined[0]
    q, k, v = rotated(layer, joined[0], call, fresh=True)
    found, rest = attention_forward(
        call.attention, q, k, v, call.documents, scale=h.scale, window=h.window, softcap=h.softcap
    )
    kept["attention"] = found.reshape(x.shape[0], h.n * h.dim)
    kept |= {f"attention_{i}": t for i, t in enumerate(rest)}
    (out,) = layer.o.output_buffers(x)
    _keep(kept, "u_o", project(layer.o, kept["attention"], (out,), layer.scratch, kept.get("seed_1")))
    out = out[:, : layer.o.n_out]
    if layer.attention_out:
        kept["o"] = out
        out, _ = layer.attention_out(out)
    return out


def rotated(layer: Layer, joined: torch.Tensor, call: Call, *, fresh: bool) -> tuple[torch.Tensor, ...]:
    """q, k and v as attention reads them, ``[tokens, heads, dim]`` each.

    Args:
        fresh: ``joined`` was just projected: positions are put on it in place. Where q and k are normed the projections
            are needed once more, so that q and k are new tensors, and made again in the backward.
    """
    q, k, v = layer.q_k_v(joined)
    if layer.q_norm and layer.k_norm:
        q, k = layer.norm_heads(q, layer.q_norm)[0], layer.norm_heads(k, layer.k_norm)[0]
    elif not fresh:
        return q, k, v
    if layer.heads.rotates:
        rope(q, k, call.cos, call.sin, q_out=q, k_out=k)
    return q, k, v


def between(layer: Layer, x: torch.Tensor, attended: torch.Tensor, kept: Tensors) -> torch.Tensor:
    """The residual between the halves, kept; and its norm as the MLP reads it."""
    if layer.mlp_in is None:
        kept["between"] = torch.add(x, attended, alpha=layer.residual_scale)
        return input_of(layer.gate_up, kept["between"], None)
    norm, read = layer.mlp_in, layer.gate_up.input_buffer(x)
    kept["between"] = torch.empty_like(x)
    rms_norm(
        attended,
        norm.weight,
        norm.eps,
        style=norm.style,
        out=read[:, : x.shape[1]],
        sum_with=x,
        sum_out=kept["between"],
        alpha=layer.residual_scale,
    )
    return read


def input_of(group: Group, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """A group's input buffer, filled with ``x`` or its norm."""
    read = group.input_buffer(x)
    if norm is None:
        read[:, : x.shape[1]] = x
    else:
        norm(x, out=read[:, : x.shape[1]])
    return read


def gate_up(layer: Layer, read: torch.Tensor, buffers: tuple[torch.Tensor, ...], kept: Tensors) -> None:
    """Gate and up, into ``buffers``."""
    _keep(kept, "u_gate_up", project(layer.gate_up, read, buffers, layer.scratch, kept.get("seed_2")))
    kept |= {f"gate_up_{i}": b for i, b in enumerate(buffers)}


def down_onto(
    layer: Layer, buffers: tuple[torch.Tensor, ...], kept: Tensors, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The activation, the down projection and the residual ``[tokens, d_model]``, into ``out`` if given."""
    if layer.mlp_out:
        kept["down"] = down(layer, buffers, kept)
        return torch.add(kept["between"], layer.mlp_out(kept["down"])[0], alpha=layer.residual_scale, out=out)
    active, seed = _active(layer, buffers), kept.get("seed_3")
    found, u = project_onto(layer.down, active, kept["between"], layer.residual_scale, layer.scratch, seed, out=out)
    _keep(kept, "u_down", u)
    return found


def down(layer: Layer, buffers: tuple[torch.Tensor, ...], kept: Tensors) -> torch.Tensor:
    """The activation and the down projection ``[tokens, d_model]``."""
    active = _active(layer, buffers)
    (out,) = layer.down.output_buffers(active)
    _keep(kept, "u_down", project(layer.down, active, (out,), layer.scratch, kept.get("seed_3")))
    return out[:, : layer.down.n_out]


def _active(layer: Layer, buffers: tuple[torch.Tensor, ...]) -> torch.Tensor:
    gate, up = layer.gate_and_up(buffers)
    return glu(gate, up, activation=layer.activation)


def _seeds(layer: Layer, x: torch.Tensor) -> Tensors:
    """A dropout's seed for each group, drawn from torch's generator; none without dropout."""
    if not any(g.dropout_now for g in layer.groups):
        return {}
    drawn = torch.randint(2**31, (4,), device=x.device)
    return {f"seed_{i}": drawn[i] for i in range(4)}


def _keep(kept: Tensors, name: str, small: torch.Tensor | None) -> None:
    if small is not None:
        kept[name] = small
