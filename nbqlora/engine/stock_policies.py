"""Policies of layers that are transformers' own.

Such a layer carries a flag and a function of its own (``GradientCheckpointingLayer``): with the flag, its forward goes
through the function. That is torch's checkpoint where the input is kept (``use_reentrant`` must be False: the reentrant
form drops the gradients of LoRA in layers before the first input that requires one), and ours where the input goes to
the host. An MLP alone gets a forward of its own, which checkpoints it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from nbqlora.core.specs import LayerPolicy
from nbqlora.memory.host_slab import HostSlab

FLAG, FUNCTION = "gradient_checkpointing", "_gradient_checkpointing_func"


def set_stock_policy(layer: Any, policy: LayerPolicy, slab: HostSlab | None, slot: int) -> None:
    """Set one on a layer.

    Raises:
        ValueError: the MLP alone is to be computed again, and the layer has none by that name.
    """
    if policy is LayerPolicy.RECOMPUTE_MLP:
        mlp = getattr(layer, "mlp", None)
        if not isinstance(mlp, torch.nn.Module):
            raise ValueError(f"a {type(layer).__name__} has no mlp that could be computed again alone")
        mlp.forward = _Checkpointed(mlp)
        return
    setattr(layer, FLAG, policy is not LayerPolicy.KEEP)
    if policy is LayerPolicy.OFFLOAD:
        assert slab is not None
        setattr(layer, FUNCTION, partial(_offloaded, layer, slab, slot))
    elif policy is not LayerPolicy.KEEP:
        setattr(layer, FUNCTION, partial(checkpoint, use_reentrant=False))


def clear_stock_policy(layer: Any) -> None:
    """The layer is its class's own again."""
    layer.__dict__.pop(FLAG, None)
    layer.__dict__.pop(FUNCTION, None)
    mlp = getattr(layer, "mlp", None)
    if isinstance(mlp, torch.nn.Module) and isinstance(mlp.__dict__.get("forward"), _Checkpointed):
        del mlp.__dict__["forward"]


class _Checkpointed:
    """A module's forward that is computed again in the backward."""

    def __init__(self, module: torch.nn.Module) -> None:
        self._own = partial(type(module).forward, module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._own(*args, **kwargs)
        return checkpoint(self._own, *args, use_reentrant=False, **kwargs)


def _offloaded(layer: Any, slab: HostSlab, slot: int, run: Callable[..., Any], hidden: torch.Tensor, *args: Any) -> Any:
    trained = [p for p in layer.parameters() if p.requires_grad]
    return _Offloaded.apply(hidden, run, args, slab, slot, *trained)


class _Offloaded(torch.autograd.Function):
    """``hidden -> the layer's output``; its input goes to the host, and the backward runs the layer once more.

    Parameters are inputs, so that the node is there even if nothing before it trains; the second run adds to their
    ``.grad`` itself.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, run: Any, args: tuple[Any, ...], slab: HostSlab, slot: int, *trained: Any
    ) -> Any:
        ctx.run, ctx.args, ctx.slab, ctx.slot, ctx.n_trained = run, args, slab, slot, len(trained)
        ctx.on_card = hidden.device.type == "cuda"
        ctx.random = (torch.get_rng_state(), torch.cuda.get_rng_state(hidden.device) if ctx.on_card else None)
        ctx.autocast = _autocast_now(hidden.device.type)
        slab.store(slot, hidden)
        found = run(hidden, *args)
        slab.settle()
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        hidden = ctx.slab.take(ctx.slot, more=ctx.needs_input_grad[0]).detach()
        hidden.requires_grad_(ctx.needs_input_grad[0])
        devices = [hidden.device] if ctx.on_card else []
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), ctx.autocast():
            torch.set_rng_state(ctx.random[0])
            if ctx.on_card:
                torch.cuda.set_rng_state(ctx.random[1], hidden.device)
            found = ctx.run(hidden, *ctx.args)
        outs = found if isinstance(found, tuple) else (found,)
        pairs = [(o, g) for o, g in zip(outs, gradients, strict=True) if g is not None and o.requires_grad]
        torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
        return (hidden.grad, *(None for _ in range(4 + ctx.n_trained)))


def _autocast_now(device_type: str) -> Callable[[], Any]:
    return partial(
        torch.autocast,
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=torch.is_autocast_cache_enabled(),
    )
