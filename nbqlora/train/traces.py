"""What TRL, accelerate and bitsandbytes leave on a model or keep of it after training, and how it is taken back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def forget_in_bitsandbytes(model: torch.nn.Module) -> None:
    """Let bitsandbytes' process-wide optimizer registry drop this model's embeddings.

    Trainer registers every embedding there for 8-bit optimizers, and nothing takes it out again: a 1B model
    left its 501 MiB embedding on the card after the run.
    """
    from bitsandbytes.optim import GlobalOptimManager

    registry = GlobalOptimManager.get_instance()
    own = set(model.modules())
    triples = registry.module_weight_config_triple
    registry.module_weight_config_triple = [t for t in triples if t[0] not in own]


def instance_forwards(model: Any) -> dict[Any, Any]:
    """The ``forward`` that each of the two outer modules carries on the instance, None for its class's own."""
    return {m: m.__dict__.get("forward") for m in (model, model.get_base_model())}


def restore_forwards(own_forwards: Mapping[Any, Any]) -> None:
    """Undo what the trainer did to the two outer modules since :func:`instance_forwards` looked at them."""
    for module, own in own_forwards.items():
        module.__dict__.pop("forward", None)
        if own is not None:
            module.forward = own
        for left in ("_original_forward", "_is_accelerate_prepared"):
            module.__dict__.pop(left, None)
