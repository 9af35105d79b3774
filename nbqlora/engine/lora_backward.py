"""Backward of the products of a frozen weight and its adapters; the formulas stand in ``lora_blocks``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nbqlora.engine.group import Group, Scratch
from nbqlora.engine.lora_blocks import Seed, dropped, small_product, weight_with_a, weight_with_b
from nbqlora.kernels.dropout import dropout


def backward_product(
    group: Group, gradients: Sequence[torch.Tensor], scratch: Scratch, seed: Seed = None, *, need_input: bool = True
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Dx ``[tokens, n_in]`` and v ``[tokens, r]``.

    Args:
        gradients: made by :meth:`Group.gradient_buffers`, their first ``n_out`` columns filled; further columns are
            written here.
        need_input: False where the input's gradient is not wanted; then dx is None.

    Returns:
        dx, whose rows may lie further apart than ``n_in``; v None without adapters.
    """
    if not group.joined and group.quantized:
        return _backward_beside(group, gradients, scratch, seed)
    v = _small_gradient(group, gradients, scratch)
    if not need_input:
        return None, v
    first = gradients[0]
    dx = torch.empty(first.shape[0], group.n_in, dtype=first.dtype, device=first.device)
    if group.quantized:
        below = 0 if seed is not None else group.r
        torch.mm(first[:, : group.n_out + below], weight_with_a(group, below, first.dtype, scratch), out=dx)
    else:
        below = 0
        for i, (dy, p) in enumerate(zip(group.split(gradients), group.projections, strict=True)):
            torch.mm(dy, p.weight, out=dx) if i == 0 else dx.addmm_(dy, p.weight)  # type: ignore[arg-type]
    if v is not None and not below:
        _add_low_rank(group, dx, v, scratch, seed)
    return dx, v


def _backward_beside(
    group: Group, gradients: Sequence[torch.Tensor], scratch: Scratch, seed: Seed
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``dy [W | B]``, summed over the parts: dx and v side by side."""
    first = gradients[0]
    both = torch.empty(first.shape[0], group.n_in + group.r, dtype=first.dtype, device=first.device)
    for i, (dy, part) in enumerate(zip(gradients, group.parts, strict=True)):
        weight = weight_with_b(group, part, both.shape[1], first.dtype, scratch)
        torch.mm(dy, weight, out=both) if i == 0 else both.addmm_(dy, weight)
    dx, v = both[:, : group.n_in], both[:, group.n_in :]
    if not group.r:
        return dx, None
    if group.scale != 1.0:
        v *= group.scale
    _add_low_rank(group, dx, v, scratch, seed)
    return dx, v


def _small_gradient(group: Group, gradients: Sequence[torch.Tensor], scratch: Scratch) -> torch.Tensor | None:
    """v, behind dy where there is room."""
    if not group.r:
        return None
    first = gradients[0]
    if group.joined:
        v = first[:, group.n_out :]
    else:
        v = torch.empty(first.shape[0], group.r, dtype=first.dtype, device=first.device)
    for dy, p, (_, r) in zip(group.split(gradients), group.projections, group.columns, strict=True):
        if p.lora:
            small_product(dy, scratch.copy_of(p.lora.b), group.scale, v[:, r])
    return v


def _add_low_rank(group: Group, dx: torch.Tensor, v: torch.Tensor, scratch: Scratch, seed: Seed) -> None:
    """``dx += drop'(v A)``."""
    a = scratch.stacked_copy(group.a_parameters)
    if seed is None:
        dx.addmm_(v, a)
    else:
        dx += dropout(torch.mm(v, a), seed, group.dropout_now)


def add_adapter_gradients(
    group: Group,
    gradients: Sequence[torch.Tensor],
    v: torch.Tensor | None,
    x: torch.Tensor,
    u: torch.Tensor | None,
    scratch: Scratch,
    seed: Seed = None,
) -> None:
    """``dA += v^T drop(x)`` and ``dB += dy^T u``.

    Args:
        v: of :func:`backward_product`.
        x: ``[tokens, n_in]`` as in the forward.
        u: what :func:`project` returned.
    """
    if u is None or v is None:
        return
    adapters = scratch.needed_adapters()
    for dy, p, (_, r) in zip(group.split(gradients), group.projections, group.columns, strict=True):
        if p.lora:
            accumulate_(adapters.gradient_of(p.lora.b), dy.t(), u[:, r])
    accumulate_(adapters.stacked_gradient(group.a_parameters), v.t(), dropped(group, x, seed))


def accumulate_(gradient: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """``gradient += left right`` in fp32, whatever the operands' dtype.

    cuBLAS adds in fp32 itself (``out_dtype``, torch 2.8 and later); elsewhere the product is rounded once first.
    """
    if left.dtype == gradient.dtype:
        gradient.addmm_(left, right)
    elif gradient.is_cuda and _ADDS_IN_FP32:
        torch.addmm(gradient, left, right, out_dtype=torch.float32, out=gradient)
    else:
        gradient += torch.mm(left, right)


_ADDS_IN_FP32 = "dtype_out" in torch.ops.aten.addmm.overloads()
