"""A base whose weights are split over cards: from the host, where all of it is, to each card, which gets its share.

A card never holds more than its shares and one whole layer. The host needs no memory of its own: files are mapped as
they are, and the ranks of a machine share the pages. What is not stored in NF4 is quantized on the card, as it is where
each card has the whole model, weight by weight and with the same bits: a host takes a second for 17 million weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from nbqlora.core.errors import ModelError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import LayerPolicy
from nbqlora.engine.checkpoint import decoder_layers
from nbqlora.engine.sharded import shard

WHOLE = "or set fsdp = false"
QUANT_TYPE = "nf4"


def check_can_split(plan: Plan) -> None:
    """Before anything is loaded: whether these processes can split what the plan says.

    Raises:
        ModelError: they cannot, with what to do.
    """
    n = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if n != plan.shards:
        raise ModelError(
            f"the plan splits each layer's weights over {plan.shards} cards, and {n} train together; "
            f"start as many with gpus = {plan.shards} or torchrun, {WHOLE}"
        )
    if not plan.load_in_4bit:
        raise ModelError(f"only 4-bit weights are split over cards; set load_in_4bit = true, {WHOLE}")
    if LayerPolicy.JOIN in plan.layer_policies:
        raise ModelError(
            "layers whose weights are split over cards cannot join, for their backward would need two layers' weights; "
            f"let them recompute or offload, {WHOLE}"
        )


def to_cards(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Give this card its share of the decoder layers' 4-bit weights, and the whole of everything else.

    Args:
        model: on the host, without adapters; its layers' linears in 4 bits, or not quantized yet.
        dtype: that weights are rounded to before they are quantized.

    Raises:
        ModelError: it has decoder layers without 4-bit weights.
    """
    from bitsandbytes.nn import Linear4bit

    layers = decoder_layers(model)
    if not layers:
        raise ModelError(f"a {type(model).__name__} has no layers that could be split over cards; set fsdp = false")
    shard(model, (_linears(path, layer, device, dtype) for path, layer in layers), device)
    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.quant_state is not None:
            module.weight.quant_state.to(device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.to(device)
    if hasattr(model, "hf_device_map"):  # PEFT and accelerate ask it where the model is
        model.hf_device_map = {"": device}


def _linears(path: str, layer: Any, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """4-bit linears by the name that their layer calls them by; those that are none yet are replaced."""
    from bitsandbytes.nn import Linear4bit

    for name, linear in list(layer.named_modules()):
        if type(linear) is torch.nn.Linear:
            parent, _, own = name.rpartition(".")
            setattr(layer.get_submodule(parent), own, _quantized(linear, device, dtype))
    found = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, Linear4bit)}
    if not found:
        raise ModelError(f"{path} has no 4-bit weights that could be split over cards; set fsdp = false")
    return found


def _quantized(linear: torch.nn.Linear, device: torch.device, dtype: torch.dtype) -> Any:
    """The linear in NF4, doubly quantized, as transformers would have it; its weight on the card."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    shape, has_bias = (linear.in_features, linear.out_features), linear.bias is not None
    made = Linear4bit(*shape, bias=has_bias, compute_dtype=dtype, quant_type=QUANT_TYPE, device="meta")
    weight = linear.weight.data.to(device, dtype)
    made.weight = Params4bit(weight, requires_grad=False, quant_type=QUANT_TYPE, module=made).to(device)
    made.bias = linear.bias
    return made.train(linear.training)
