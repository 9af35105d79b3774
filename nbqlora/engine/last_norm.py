"""The norm behind the last layer, one kernel each way; transformers' own is a dozen passes over the hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nbqlora.engine.layer import Norm
from nbqlora.engine.layer_probe import PROBE_TOKENS, TOLERANCE
from nbqlora.kernels.rms_norm import rms_norm_backward


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        flat = x.flatten(0, -2)
        y, rstd = norm(flat)
        ctx.save_for_backward(flat, rstd)
        ctx.norm = norm
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        flat, rstd = ctx.saved_tensors
        norm = ctx.norm
        dy = gradients[0].flatten(0, -2)
        return rms_norm_backward(dy, flat, norm.weight, rstd, style=norm.style).view(gradients[0].shape), None


def norm_forward(module: Any, norm: Norm, skips: Callable[[], bool]) -> Any:
    """A forward for the instance ``module``, which is ``norm``.

    Args:
        skips: says that the caller norms what it needs itself.
    """

    def forward(hidden_states: torch.Tensor) -> torch.Tensor:
        if skips():
            return hidden_states
        if hidden_states.dtype != norm.weight.dtype:
            own: torch.Tensor = type(module).forward(module, hidden_states)
            return own
        normed: torch.Tensor = _Normed.apply(hidden_states, norm)
        return normed

    return forward


def norm_differs(module: Any, norm: Norm) -> bool:
    """Whether the module computes something else, forward or backward."""
    numbers = torch.Generator().manual_seed(0)
    shape = (2, 1, PROBE_TOKENS, norm.weight.numel())
    x, gradient = torch.randn(shape, generator=numbers).to(norm.weight.device, norm.weight.dtype)
    with torch.enable_grad():
        read = [x.clone().requires_grad_() for _ in range(2)]
        outs = [module(read[0]), _Normed.apply(read[1], norm)]
        slopes = [torch.autograd.grad(out, at, gradient)[0] for out, at in zip(outs, read, strict=True)]
    return any(_apart(own, ours, norm) for own, ours in (outs, slopes))


def _apart(own: torch.Tensor, ours: torch.Tensor, norm: Norm) -> bool:
    own, ours = own.detach().float(), ours.detach().float()
    return bool((own - ours).norm() > TOLERANCE[norm.weight.dtype] * own.norm())
