r"""Products of a frozen weight and its adapters, forward and backward, with as few passes over wide tensors as can be.

Formula: for x ``[tokens, n_in]``, ``y = x W^T + u B^T`` with ``u = s drop(x) A^T``. Backward, with dy:
``v = s dy B``, ``dA += v^T drop(x)``, ``dB += dy^T u``, ``dx = dy W + drop'(v A)``.

W exists only in the dequantization buffer, so the buffer is made larger and one matmul does more:

- ``[x | u] [W | B]^T`` adds the small term: no pass over y. u stands behind x, in a buffer that is ours.
- ``x [W ; A]^T`` finds u beside y: no pass over x of its own; then the small term is added. For inputs that are
  somebody else's, and wide (the activation's).
- backward of projections side by side: ``[dy | v] [W ; A]`` is dx.
- backward of gate and up, whose dy are wide: ``dy [W | B]`` finds dx and v at once.

By arithmetic that saves 1.2 GB of traffic a layer at 2 x 2048 tokens of an 8B model. Unquantized weights, and dropout
where it stands between, take the small terms separately.

Gradients of A and B are added straight to the flat fp32 buffer; autograd never holds them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from nbqlora.engine.group import Group, Scratch
from nbqlora.engine.projection import Projection, unpack
from nbqlora.kernels.dropout import dropout
from nbqlora.kernels.low_rank_add import low_rank_add

Seed = torch.Tensor | None


def project(
    group: Group, x: torch.Tensor, outs: Sequence[torch.Tensor], scratch: Scratch, seed: Seed = None
) -> torch.Tensor | None:
    """Write the group's outputs.

    Args:
        x: ``[tokens, n_in]``, or made by :meth:`Group.input_buffer`: then its last columns are filled here.
        outs: made by :meth:`Group.output_buffers`; their first ``n_out`` columns are the outputs.
        seed: of the dropout; None for no dropout.

    Returns:
        u ``[tokens, r]``, for the backward; None without adapters.
    """
    u: torch.Tensor | None
    if group.r and group.quantized and not group.reads_own and seed is None:
        u = _found_beside(group, x, outs[0], scratch)
        _add_small(group, u, outs, scratch)
    else:
        u = _small_input(group, x[:, : group.n_in], scratch, seed)
        appended = group.quantized and group.reads_own and u is not None
        if appended and u is not None:
            x[:, group.n_in :] = u
        for out, part in zip(outs, group.parts, strict=True):
            body = out[:, : sum(p.n_out for p in part)]
            _product(group, part, x if appended else x[:, : group.n_in], body, scratch)
        if not appended:
            _add_small(group, u, outs, scratch)
    for out, p in zip(group.split(outs), group.projections, strict=True):
        if p.bias is not None:
            out += p.bias
    return u


def project_onto(
    group: Group,
    x: torch.Tensor,
    residual: torch.Tensor,
    alpha: float,
    scratch: Scratch,
    seed: Seed = None,
    *,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``residual + alpha * (the output of the one projection of this group)``, and u as :func:`project` returns it.

    The small term and the residual are added in one pass.

    Args:
        out: ``[tokens, n_out]``, where the sum goes; allocated when None.
    """
    (product,) = group.output_buffers(x)
    body, (p,) = product[:, : group.n_out], group.projections
    if p.lora and group.quantized and seed is None and p.bias is None:
        u = _found_beside(group, x, product, scratch)
        return low_rank_add(body, u, scratch.copy_of(p.lora.b), residual=residual, alpha=alpha, out=out), u
    found = project(group, x, (product,), scratch, seed)
    return torch.add(residual, body, alpha=alpha, out=out), found


def _found_beside(group: Group, x: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """``x [W ; A]^T``: the output's first columns and u, scaled."""
    torch.mm(x, weight_with_a(group, group.r, x.dtype, scratch).t(), out=out)
    return out[:, group.n_out :] * group.scale


def weight_with_a(group: Group, below: int, dtype: torch.dtype, scratch: Scratch) -> torch.Tensor:
    """``[W ; A]``, the group's weights one below the other; W alone where ``below`` is 0."""
    weight = scratch.arena.take(group.n_out + below, group.n_in, dtype)
    begin = 0
    for p in group.projections:
        unpack(p.weight, weight[begin : begin + p.n_out])  # type: ignore[arg-type]
        begin += p.n_out
    if below:
        weight[group.n_out :] = scratch.stacked_copy(group.a_parameters)
    return weight


def _small_input(group: Group, x: torch.Tensor, scratch: Scratch, seed: Seed) -> torch.Tensor | None:
    if not group.r:
        return None
    u = torch.empty(x.shape[0], group.r, dtype=x.dtype, device=x.device)
    small_product(dropped(group, x, seed), scratch.stacked_copy(group.a_parameters).t(), group.scale, u)
    return u


def dropped(group: Group, x: torch.Tensor, seed: Seed) -> torch.Tensor:
    """What the adapters read: ``x``, or what dropout leaves of it."""
    return x if seed is None else dropout(x, seed, group.dropout_now)


def small_product(x: torch.Tensor, weight: torch.Tensor, scale: float, out: torch.Tensor) -> None:
    """``out = scale * x weight``; out's former contents do not count."""
    if scale == 1.0:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(out, x, weight, beta=0, alpha=scale, out=out)


def _product(group: Group, part: Sequence[Projection], x: torch.Tensor, out: torch.Tensor, scratch: Scratch) -> None:
    """One matmul with the weights of a part, B's columns behind them where x has room for u."""
    if not group.quantized:
        begin = 0
        for p in part:
            torch.mm(x, p.weight.t(), out=out[:, begin : begin + p.n_out])  # type: ignore[union-attr]
            begin += p.n_out
        return
    torch.mm(x, weight_with_b(group, part, x.shape[1], x.dtype, scratch).t(), out=out)


def weight_with_b(
    group: Group, part: Sequence[Projection], width: int, dtype: torch.dtype, scratch: Scratch
) -> torch.Tensor:
    """``[W | B]`` of a part, each B in the columns of its own ranks; W alone where ``width`` is no wider."""
    ranks = {id(p): r for p, (_, r) in zip(group.projections, group.columns, strict=True)}
    weight = scratch.arena.take(sum(p.n_out for p in part), width, dtype)
    begin = 0
    for p in part:
        extra = scratch.copy_of(p.lora.b) if p.lora and width > group.n_in else None
        unpack(p.weight, weight[begin : begin + p.n_out], extra=extra, extra_at=ranks[id(p)].start)  # type: ignore[arg-type]
        begin += p.n_out
    return weight


def _add_small(group: Group, u: torch.Tensor | None, outs: Sequence[torch.Tensor], scratch: Scratch) -> None:
    """``y += u B^T``."""
    for out, p, (_, r) in zip(group.split(outs), group.projections, group.columns, strict=True):
        if p.lora and u is not None:
            out.addmm_(u[:, r], scratch.copy_of(p.lora.b).t())
