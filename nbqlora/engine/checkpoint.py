"""What each decoder layer keeps between forward and backward.

A policy is set on the instance, of a fused layer or of one of transformers' own, and any mix works: loss and gradients
are bit-equal for every mix on a CPU (tests).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.fused import engine_of
from nbqlora.engine.layer import Layer
from nbqlora.engine.stock_policies import clear_stock_policy, set_stock_policy
from nbqlora.memory.host_slab import HostSlab


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The layers that can be recomputed, with their paths, first to last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]


def apply_policies(
    model: torch.nn.Module, policies: Sequence[LayerPolicy], *, slot_bytes: int = 0, mlp_tile_tokens: int = 0
) -> tuple[Replacement, ...]:
    """Set one policy a layer; what was set before is undone.

    Args:
        slot_bytes: the largest input of a layer, for those that offload.
        mlp_tile_tokens: tokens that an MLP which is computed again handles at once; 0 for all. Fused layers only.

    Raises:
        ValueError: there are more or fewer layers than policies, or a policy that a layer cannot have.
    """
    layers = decoder_layers(model)
    if len(layers) != len(policies):
        raise ValueError(f"the plan holds {len(policies)} layer policies; the model has {len(layers)} layers")
    clear_policies(model)
    engine = engine_of(model)
    of = {} if engine is None else {id(engine.modules[path]): fused for path, fused in engine.layers.items()}
    slab = _slab(policies, slot_bytes, next(layers[0][1].parameters()).device) if layers else None
    if engine is not None:
        engine.scratch.slab, engine.scratch.mlp_tile_tokens = slab, mlp_tile_tokens
    made, slot = [], 0
    for i, ((name, layer), policy) in enumerate(zip(layers, policies, strict=True)):
        fused = of.get(id(layer))
        _check(name, policy, fused, policies[i - 1] if i else None)
        if fused is not None:
            fused.policy, fused.slot = policy, slot
            fused.joined_by_next = i + 1 < len(policies) and policies[i + 1] is LayerPolicy.JOIN
        else:
            set_stock_policy(layer, policy, slab, slot)
        slot += policy is LayerPolicy.OFFLOAD
        if policy is not LayerPolicy.KEEP:
            made.append(Replacement(path=name, old="keep", new=policy.value, because=BECAUSE[policy]))
    return tuple(made)


BECAUSE = {
    LayerPolicy.RECOMPUTE_MLP: "the plan computes gate and up again in the backward",
    LayerPolicy.RECOMPUTE: "the plan keeps only its input and computes it again in the backward",
    LayerPolicy.OFFLOAD: "the plan keeps only its input, in host memory, and computes it again in the backward",
    LayerPolicy.JOIN: "the plan keeps nothing: its input is computed again too, from the layer before",
}


def _slab(policies: Sequence[LayerPolicy], slot_bytes: int, device: torch.device) -> HostSlab | None:
    n = sum(policy is LayerPolicy.OFFLOAD for policy in policies)
    if n and not slot_bytes:
        raise ValueError(f"{n} layers offload their input, and slot_bytes does not say how large it is")
    return HostSlab(n, slot_bytes, device) if n else None


def _check(name: str, policy: LayerPolicy, fused: Layer | None, before: LayerPolicy | None) -> None:
    if policy is not LayerPolicy.JOIN:
        return
    if fused is None:
        raise ValueError(f"{name} is not a fused layer: its input cannot be computed again from the layer before")
    if before not in (LayerPolicy.RECOMPUTE, LayerPolicy.OFFLOAD, LayerPolicy.JOIN):
        raise ValueError(f"{name} joins the layer before it, which has to recompute, offload or join itself")


def clear_policies(model: torch.nn.Module) -> None:
    """Undo :func:`apply_policies`: every layer is its class's own again, and keeps everything."""
    engine = engine_of(model)
    if engine is not None:
        for fused in engine.layers.values():
            fused.policy, fused.slot, fused.joined_by_next = LayerPolicy.KEEP, 0, False
        if engine.scratch.slab is not None:
            engine.scratch.slab.free()
        engine.scratch.slab, engine.scratch.joined, engine.scratch.mlp_tile_tokens = None, None, 0
    for _, layer in decoder_layers(model):
        clear_stock_policy(layer)
