"""What each decoder layer keeps between forward and backward.

transformers' layers carry a flag and a function of their own (``GradientCheckpointingLayer``), so a
policy is set on the instance and any mix works: loss and gradients are bit-equal for every mix on a CPU
(tests). ``use_reentrant`` must be False: the reentrant form drops the gradients of LoRA in the layers
before the first input that requires one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.fused import engine_of


def decoder_layers(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """The layers that can be recomputed, with their paths, first to last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [(name, m) for name, m in model.named_modules() if isinstance(m, GradientCheckpointingLayer)]


def apply_policies(model: torch.nn.Module, policies: Sequence[LayerPolicy]) -> tuple[Replacement, ...]:
    """Set one policy a layer.

    Raises:
        ValueError: there are more or fewer layers than policies.
    """
    layers = decoder_layers(model)
    if len(layers) != len(policies):
        raise ValueError(f"the plan holds {len(policies)} layer policies; the model has {len(layers)} layers")
    engine = engine_of(model)
    fused = {} if engine is None else engine.layers
    of = {id(module): path for path, module in ({} if engine is None else engine.modules).items()}
    made = []
    for (name, layer), policy in zip(layers, policies, strict=True):
        path = of.get(id(layer), "")
        if path in fused:
            fused[path].policy = policy
        else:
            _set_flag(layer, policy)
        if policy is not LayerPolicy.KEEP:
            made.append(Replacement(path=name, old="keep", new=policy.value, because=BECAUSE[policy]))
    return tuple(made)


BECAUSE = {
    LayerPolicy.RECOMPUTE_MLP: "the plan computes gate and up again in the backward",
    LayerPolicy.RECOMPUTE: "the plan keeps only its input and computes it again in the backward",
}


def _set_flag(layer: Any, policy: LayerPolicy) -> None:
    """A layer of transformers' own keeps everything, or its input alone."""
    layer.gradient_checkpointing = policy is not LayerPolicy.KEEP
    if policy is not LayerPolicy.KEEP:
        layer._gradient_checkpointing_func = partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)


def clear_policies(model: torch.nn.Module) -> None:
    """Undo :func:`apply_policies`: every layer is its class's own again, and keeps everything."""
    engine = engine_of(model)
    for fused in () if engine is None else engine.layers.values():
        fused.policy = LayerPolicy.KEEP
    for _, layer in decoder_layers(model):
        layer.__dict__.pop("gradient_checkpointing", None)
        layer.__dict__.pop("_gradient_checkpointing_func", None)
