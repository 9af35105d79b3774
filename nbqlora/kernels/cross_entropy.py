"""Cross entropy of a chunk of logits, which are overwritten by their own gradient.

With z = cap(scale * logit), cap(x) = softcap * tanh(x / softcap) or x, and t the target, the loss of a row is
``logsumexp(z) - z[t]``, and the gradient of ``factor`` times the sum of losses is
``factor * scale * (softmax(z) - onehot(t)) * cap'``. The head's loss needs no other use of the logits once it has their
gradient, and at 128k entries a row a second buffer is what runs out of memory first; so one is all there is.

A program has a row and goes over it twice: once for the sum of exponentials, kept for each lane with the largest
value that the lane has met, so that lanes meet only at the end; and once to write the gradient. Of the two exponentials
that a new largest value asks for, one is always exp(0), so a lane takes one. A row is read twice and written once; the
second read finds it in the second cache where the rows at work fit there. All is fp32 between the reads and the writes.
"""

from __future__ import annotations

import torch

from nbqlora.kernels._launch import jit, next_power_of_2, row_stride, tl, use_triton

# Rows with this target have no loss: what torch and transformers call them.
IGNORED = -100
# 16 bytes of a two-byte type for each of 512 threads.
BLOCK = 4096
ELEMENTS_A_WARP = 256


def cross_entropy_reference_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    factor: float | torch.Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    losses: torch.Tensor | None = None,
    with_gradient: bool = True,
) -> torch.Tensor:
    """:func:`cross_entropy_` in plain torch, on any device; fp64 stays fp64."""
    losses = _checked(logits, targets, losses)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    slope = None
    if softcap:
        tanh = torch.tanh(z / softcap)
        z, slope = softcap * tanh, 1 - tanh * tanh
    ignored = targets == IGNORED
    known = (targets >= 0) & (targets < logits.shape[1])
    at = torch.where(known, targets, 0)[:, None]
    share = torch.log_softmax(z, dim=1)
    loss = torch.where(known, -share.gather(1, at).squeeze(1), torch.nan)
    losses.copy_(loss.masked_fill_(ignored, 0))
    if with_gradient:
        gradient = torch.exp(share)
        gradient.scatter_add_(1, at, gradient.new_full(at.shape, -1.0))
        if slope is not None:
            gradient *= slope
        gradient *= torch.where(known[:, None], factor * scale, torch.nan)
        logits.copy_(gradient.masked_fill_(ignored[:, None], 0))
    return losses


@jit
def _capped(b_logit, scale, softcap, HAS_CAP: tl.constexpr):
    """What a logit is turned into; tanh(x) as 1 - 2 / (1 + exp(2x)), which is right where the exponential is inf."""
    b_z = b_logit.to(tl.float32) * scale
    if HAS_CAP:
        b_z = softcap - 2.0 * softcap / (1.0 + tl.exp(b_z * (2.0 / softcap)))
    return b_z


@jit
def _logsumexp(p_row, vocab, scale, softcap, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """Its two parts, the largest z and the rest: their sum would lose the rest's last digits."""
    # Finite, so that no difference of two infinities arises.
    b_max = tl.full([BLOCK], -3.4e38, dtype=tl.float32)
    b_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for i_block in range(BLOCKS):
        o = i_block * BLOCK + tl.arange(0, BLOCK)
        m = o < vocab
        b_z = tl.where(m, _capped(tl.load(p_row + o, mask=m), scale, softcap, HAS_CAP), float("-inf"))
        b_exp = tl.exp(-tl.abs(b_z - b_max))
        b_sum = tl.where(b_z > b_max, b_sum * b_exp + 1.0, b_sum + b_exp)
        b_max = tl.maximum(b_max, b_z)
    b_top = tl.max(b_max)
    return b_top, tl.log(tl.sum(b_sum * tl.exp(b_max - b_top)))


@jit
def _cross_entropy_fwd_kernel(
    p_logits, p_targets, p_losses, p_factor, vocab, logits_row, targets_row, losses_row, factor, scale, softcap,
    HAS_CAP: tl.constexpr, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * logits_row
    i_target = tl.load(p_targets + i_row * targets_row)
    if i_target == -100:
        tl.store(p_losses + i_row * losses_row, 0.0)
        if WITH_GRADIENT:
            for i_block in range(BLOCKS):
                o = i_block * BLOCK + tl.arange(0, BLOCK)
                tl.store(p_row + o, tl.zeros([BLOCK], dtype=p_logits.dtype.element_ty), mask=o < vocab)
    else:
        # A target that is no entry makes the row NaN; the row is read there only if it is one. Read before any of the
        # row is overwritten: the reductions between are barriers.
        known = (i_target >= 0) & (i_target < vocab)
        b_at = tl.load(p_row + i_target, mask=known, other=float("nan"))
        b_top, b_rest = _logsumexp(p_row, vocab, scale, softcap, HAS_CAP, BLOCK, BLOCKS)
        tl.store(p_losses + i_row * losses_row, b_top - _capped(b_at, scale, softcap, HAS_CAP) + b_rest)
        if WITH_GRADIENT:
            b_weight = scale * (factor if p_factor is None else tl.load(p_factor).to(tl.float32))
            b_weight = tl.where(known, b_weight, float("nan"))
            for i_block in range(BLOCKS):
                o = i_block * BLOCK + tl.arange(0, BLOCK)
                b_z = _capped(tl.load(p_row + o, mask=o < vocab), scale, softcap, HAS_CAP)
                b_gradient = b_weight * (tl.exp(b_z - b_top - b_rest) - tl.where(o == i_target, 1.0, 0.0))
                if HAS_CAP:
                    b_tanh = b_z * (1.0 / softcap)
                    b_gradient *= 1.0 - b_tanh * b_tanh
                tl.store(p_row + o, b_gradient.to(p_logits.dtype.element_ty), mask=o < vocab)


def cross_entropy_triton_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    factor: float | torch.Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    losses: torch.Tensor | None = None,
    with_gradient: bool = True,
) -> torch.Tensor:
    """:func:`cross_entropy_` in one launch."""
    losses = _checked(logits, targets, losses)
    rows, vocab = logits.shape
    on_device = isinstance(factor, torch.Tensor)
    _cross_entropy_fwd_kernel[(rows,)](
        logits, targets, losses, factor if on_device else None, vocab,
        row_stride(logits), targets.stride(0), losses.stride(0),
        1.0 if on_device else float(factor), float(scale), float(softcap),
        HAS_CAP=softcap != 0, WITH_GRADIENT=with_gradient, **tile_of(vocab),
    )  # fmt: skip
    return losses


def tile_of(vocab: int) -> dict[str, int]:
    """What the kernel is compiled for: of a short row, no more than it has."""
    block = min(BLOCK, next_power_of_2(vocab))
    return {"BLOCK": block, "BLOCKS": -(-vocab // block), "num_warps": max(1, block // ELEMENTS_A_WARP)}


def _checked(logits: torch.Tensor, targets: torch.Tensor, losses: torch.Tensor | None) -> torch.Tensor:
    """``losses``, made if there are none yet."""
    row_stride(logits)
    rows = logits.shape[0]
    if targets.shape != (rows,) or targets.dtype != torch.int64:
        raise ValueError(f"expected {rows} targets in int64, got {tuple(targets.shape)} in {targets.dtype}")
    if losses is None:
        return torch.empty(rows, dtype=torch.promote_types(logits.dtype, torch.float32), device=logits.device)
    if losses.shape != (rows,):
        raise ValueError(f"expected room for {rows} losses, got {tuple(losses.shape)}")
    return losses


def cross_entropy_(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    factor: float | torch.Tensor,
    scale: float = 1.0,
    softcap: float = 0.0,
    losses: torch.Tensor | None = None,
    with_gradient: bool = True,
) -> torch.Tensor:
    """The loss of each row, and the gradient in place of the logits.

    Args:
        logits: ``[rows, vocab]``, any row stride; overwritten in its own dtype unless ``with_gradient`` is off.
        targets: ``[rows]`` int64. -100: no loss and a gradient of zero. Any other that is no column: both are NaN.
        factor: what the sum of losses is multiplied by before its gradient is taken (the loss scale over the number of
            tokens); a 0-d tensor on the same device is read there, without a wait. The losses are without it.
        scale: what the logits are multiplied by first.
        softcap: bound of the scaled logits; 0 for none.
        losses: ``[rows]`` fp32 to write to.
        with_gradient: off, the logits are only read.

    Returns:
        ``losses``.

    Raises:
        ValueError: shapes or dtypes that do not fit, or elements of a row that are not neighbours.
    """
    op = cross_entropy_triton_ if use_triton(logits) else cross_entropy_reference_
    return op(logits, targets, factor=factor, scale=scale, softcap=softcap, losses=losses, with_gradient=with_gradient)
