"""Put the fused layers on a loaded model, and take them off again.

Every kind of layer is tried before it is replaced: a few tokens through transformers' own forward and through ours,
values and gradients. Where they differ, or a part is unknown, the layer stays what it was, and the list of
replacements says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.plan import Plan, Replacement
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.checkpoint import apply_policies, clear_policies, decoder_layers
from nbqlora.engine.fused import ATTRIBUTE, Engine, engine_of
from nbqlora.engine.group import Scratch
from nbqlora.engine.host_embedding import embedding_back
from nbqlora.engine.last_norm import norm_differs
from nbqlora.engine.layer import Layer
from nbqlora.engine.layer_probe import differs
from nbqlora.engine.match import read_last_norm, read_layer
from nbqlora.engine.projection import NotMatchedError
from nbqlora.engine.sharded import ShardedWeights, shards_of
from nbqlora.memory.arena import DequantArena

OLD = "transformers' layer, PEFT's linears"
NEW = "fused layer"


def optimize(model: Any, plan: Plan | None = None) -> tuple[Replacement, ...]:
    """Replace what can be replaced on this instance, and set each layer's policy as the plan says.

    Args:
        model: a ``PeftModel``, or transformers' model.
        plan: for the policies; None keeps everything.

    Returns:
        What was replaced, and what was looked at and left, with the reason.

    Raises:
        ModelError: the weights are split over cards, and a layer cannot be replaced: nothing else gathers them.
    """
    _take_off(model)
    engine, made = _engine(model)
    if shards_of(model) is not None and (engine is None or not engine.complete):
        left = next(f"{one.path}: {one.because}" for one in made if not one.new)
        raise ModelError(f"weights can be split over cards where every layer is a fused one ({left}); set fsdp = false")
    if engine is not None:
        _base(model).__dict__[ATTRIBUTE] = engine
        engine.install()
    return made if plan is None else (*made, *apply_plan(model, plan))


def apply_plan(model: Any, plan: Plan) -> tuple[Replacement, ...]:
    """Set each layer's policy and the MLPs' tiles as the plan says, in place of what was set before.

    Raises:
        ModelError: the weights are split over cards, and a layer is to join: its backward would need two layers'.
    """
    if shards_of(model) is not None and LayerPolicy.JOIN in plan.layer_policies:
        raise ModelError("layers whose weights are split over cards cannot join: plan recompute or offload for them")
    n = sum(policy is LayerPolicy.OFFLOAD for policy in plan.layer_policies)
    slot_bytes = plan.host_bytes // n if n else 0
    tile = plan.mlp_tile_tokens
    return apply_policies(model, plan.layer_policies, slot_bytes=slot_bytes, mlp_tile_tokens=tile)


def restore(model: Any, *, own_storage: bool = True) -> None:
    """Undo :func:`optimize`: every attribute is what it was; parameters and gradients keep their values.

    Args:
        own_storage: False leaves the adapters views of one buffer and an embedding where it is, and allocates nothing:
            for a card that may be full.
    """
    _take_off(model, own_storage=own_storage)
    if own_storage:
        embedding_back(model)


def _take_off(model: Any, *, own_storage: bool = True) -> None:
    clear_policies(model)
    engine = engine_of(model)
    if engine is not None:
        engine.remove(own_storage=own_storage)
        del _base(model).__dict__[ATTRIBUTE]


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _engine(model: Any) -> tuple[Engine | None, tuple[Replacement, ...]]:
    base = _base(model)
    decoder = getattr(base, "base_model", base)
    modules = dict(decoder_layers(base))
    if not modules or not hasattr(decoder, "rotary_emb"):
        return None, (_left("model", f"a {type(decoder).__name__} has no layers that can be replaced"),)
    first = next(iter(modules.values()))
    device = next(first.parameters()).device
    dtype = _dtype(first)
    scratch = Scratch(DequantArena(device, 0))
    layers, reasons = _read(modules, decoder.config, scratch)
    shards = shards_of(model)
    if shards is not None:
        _attach(shards, layers, modules)
    if layers:
        scratch.arena = DequantArena(device, max(scratch_bytes(x, dtype) for x in layers.values()))
        scratch.adapters = flat_adapters(layers, dtype)
        reasons |= _tried(layers, modules, decoder, dtype, shards)
    if shards is not None:
        shards.trains_from = _trains_from(base, layers)
    made = _told(layers, reasons)
    if not layers:
        if scratch.adapters is not None:
            scratch.adapters.release()
        return None, made
    last = read_last_norm(decoder)
    last = last if last is not None and not norm_differs(decoder.norm, last) else None
    return Engine(decoder, layers, modules, scratch, dtype, last, shards), made


def _dtype(layer: Any) -> torch.dtype:
    """The dtype that the layer computes in: its norms', which nothing quantizes."""
    return next(p.dtype for n, p in layer.named_parameters() if "norm" in n)


def scratch_bytes(layer: Layer, dtype: torch.dtype) -> int:
    """Of the buffer that its largest weight is unpacked into."""
    return max(g.scratch_elements() for g in layer.groups) * dtype.itemsize


def _read(modules: Mapping[str, Any], config: Any, scratch: Scratch) -> tuple[dict[str, Layer], dict[str, str]]:
    layers, reasons = {}, {}
    for path, module in modules.items():
        try:
            layers[path] = read_layer(module, config, scratch)
        except (NotMatchedError, AttributeError) as error:
            reasons[path] = str(error)
    return layers, reasons


def flat_adapters(layers: Mapping[str, Layer], dtype: torch.dtype) -> FlatAdapters | None:
    """One buffer for all; the A matrices of a group stand next to each other."""
    parameters, beside = [], []
    for layer in layers.values():
        for group in layer.groups:
            n = len(group.a_parameters)
            parameters += group.parameters
            beside += [0 < i < n for i in range(len(group.parameters))]
    return FlatAdapters(parameters, beside, dtype) if parameters else None


def _attach(shards: ShardedWeights, layers: Mapping[str, Layer], modules: Mapping[str, Any]) -> None:
    """From here on a fused layer's weights are there while it is open."""
    for place, path in enumerate(modules):
        if path in layers:
            shards.layers[place].attach(layers[path])
            layers[path].opened = partial(shards.opened, place)


def _trains_from(base: Any, layers: Mapping[str, Layer]) -> int:
    """The first layer whose backward runs."""
    if any(p.requires_grad for p in base.get_input_embeddings().parameters()):
        return 0
    return next((place for place, layer in enumerate(layers.values()) if layer.parameters), len(layers))


def _tried(
    layers: dict[str, Layer],
    modules: Mapping[str, Any],
    decoder: Any,
    dtype: torch.dtype,
    shards: ShardedWeights | None,
) -> dict[str, str]:
    """Drop the kinds of layers that do not compute what transformers' own compute; with the reasons."""
    verdicts: dict[tuple[Any, ...], str] = {}
    reasons = {}
    for path in list(layers):
        kind = _kind(layers[path], modules[path])
        if kind not in verdicts:
            place = list(modules).index(path)
            with nullcontext() if shards is None else shards.alone(place):
                verdicts[kind] = differs(layers[path], modules[path], decoder, dtype)
        if verdicts[kind]:
            reasons[path] = verdicts[kind]
            del layers[path]
    return reasons


def _kind(layer: Layer, module: Any) -> tuple[Any, ...]:
    """What makes layers alike for the probe: their class, heads, adapters and biases."""
    parts = tuple((p.name, p.n_out, p.r, p.bias is not None) for g in layer.groups for p in g.projections)
    return type(module), layer.heads, parts


def _left(path: str, because: str) -> Replacement:
    return Replacement(path=path, old=OLD, new="", because=because)


def _told(layers: Mapping[str, Layer], reasons: Mapping[str, str]) -> tuple[Replacement, ...]:
    """One line for the fused layers, one for each reason to leave some."""
    told = []
    if layers:
        because = "same values and gradients as transformers' own on a probe; keeps less, and needs fewer passes"
        told.append(Replacement(path=_paths(list(layers)), old=OLD, new=NEW, because=because))
        if any(g.r and len(g.projections) > 1 and _drops(layers) for x in layers.values() for g in x.groups):
            shared = "adapters that read the same input share one dropout mask"
            told.append(
                Replacement(path="lora_dropout", old="one mask a linear", new="one mask an input", because=shared)
            )
    for reason, _ in Counter(reasons.values()).most_common():
        told.append(_left(_paths([p for p, r in reasons.items() if r == reason]), reason))
    return tuple(told)


def _drops(layers: Mapping[str, Layer]) -> bool:
    loras = (p.lora for x in layers.values() for g in x.groups for p in g.projections if p.lora)
    return any(float(getattr(lora.dropout, "p", 0.0)) > 0 for lora in loras)


def _paths(paths: Sequence[str]) -> str:
    return paths[0] if len(paths) == 1 else f"{len(paths)} layers: {paths[0]} ... {paths[-1]}"
