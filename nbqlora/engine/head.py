r"""Loss of the supervised tokens only, in chunks, so that no ``[tokens, vocab]`` tensor is ever kept.

Formula: with h ``[n, d_model]`` the hidden states that predict a supervised token, W ``[vocab, d_model]``
and t the targets, ``loss = sum_i logsumexp(z_i) - z_i[t_i]`` where ``z = cap(scale * (h W^T + b))``.
The head is frozen, so the gradient with respect to h is all that backward needs; it is made in the
forward, chunk by chunk, while the logits exist: ``dh = scale * (softmax(z) - onehot(t)) * cap'(z) W``.

Cost: one chunk of logits, which become their own gradient in place, instead of all of them; the same arithmetic.
TRL's fused loss does this only where Triton runs, and scores every position elsewhere: on two CPU cores that was 42 %
of a step.

Whether this is the same loss as the model's own is not assumed: :func:`choose_loss` compares the logits of a
few tokens and leaves the model's own head in place where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import HeadSpec
from nbqlora.kernels.cross_entropy import cross_entropy_

IGNORED = -100
PROBE_TOKENS = 16
# Largest difference of the probe's logits, as a share of the largest logit.
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

# model, batch -> (sum of the losses of the supervised tokens, their number), both 0-d tensors
LossFunction = Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


def head_loss_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, head: HeadSpec
) -> torch.Tensor:
    """The formula in one piece, for tests: hidden ``[n, d_model]``, targets ``[n]`` -> 0-d sum."""
    return torch.nn.functional.cross_entropy(_logits(hidden, weight, bias, head), targets, reduction="sum")


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, head: HeadSpec) -> torch.Tensor:
    """``z``, ``[n, vocab]``, at least in fp32."""
    product = torch.nn.functional.linear(hidden, weight, bias)
    logits = product.to(torch.promote_types(product.dtype, torch.float32)) * (head.logit_factor / head.logit_divisor)
    if head.logit_softcap:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    return logits


class _HeadLoss(torch.autograd.Function):
    """``hidden [n, d_model] -> 0-d sum``; the head's own weight gets no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: HeadSpec,
        chunk_tokens: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = []
        for begin in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            found, slope = head_chunk(
                hidden[rows], weight, bias, targets[rows], head, with_gradient=gradient is not None
            )
            losses.append(found)
            if gradient is not None and slope is not None:
                gradient[rows] = slope
        if gradient is not None:
            ctx.save_for_backward(gradient)
        # One sum over all tokens: the same bits, however many chunks they came in.
        return torch.cat(losses).sum() if losses else hidden.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None


def head_chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: HeadSpec,
    *,
    with_gradient: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Losses of a chunk ``[n]``, fp32, and their sum's gradient with respect to ``hidden [n, d_model]``.

    The logits become their own gradient in place; a target of -100 counts for nothing.
    """
    logits = torch.nn.functional.linear(hidden, weight, bias)
    scale, softcap = head.logit_factor / head.logit_divisor, head.logit_softcap or 0.0
    losses = cross_entropy_(logits, targets, factor=1.0, scale=scale, softcap=softcap, with_gradient=with_gradient)
    return losses, torch.mm(logits, weight) if with_gradient else None


def head_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: HeadSpec,
    chunk_tokens: int,
) -> torch.Tensor:
    """Summed loss, chunk by chunk.

    Args:
        hidden: ``[n, d_model]``, in the head's dtype.
        weight: ``[vocab, d_model]``, frozen.
        bias: ``[vocab]`` or None.
        targets: ``[n]`` token ids.
        chunk_tokens: rows of logits that exist at once.

    Returns:
        0-d fp32 sum over the n tokens.
    """
    result: torch.Tensor = _HeadLoss.apply(hidden, weight, bias, targets, head, chunk_tokens)
    return result


def _base(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shifted(batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Which positions predict a supervised token ``[rows, seq - 1]``, and those tokens ``[n]``."""
    targets = batch["labels"][:, 1:]
    mask = targets != IGNORED
    return mask, targets[mask]


def chunked_loss(head: HeadSpec, chunk_tokens: int) -> LossFunction:
    """The loss through the decoder and :func:`head_loss`."""

    def loss(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        base = _base(model)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        hidden = base.base_model(**inputs, use_cache=False).last_hidden_state
        mask, targets = _shifted(batch)
        output = base.get_output_embeddings()
        rows = hidden[:, :-1][mask].to(output.weight.dtype)
        return head_loss(rows, output.weight, output.bias, targets, head, chunk_tokens), mask.sum()

    return loss


def own_logits_loss(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss from the model's own logits, all of them: right for any model, and large."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits
    mask, targets = _shifted(batch)
    return torch.nn.functional.cross_entropy(logits[:, :-1][mask].float(), targets, reduction="sum"), mask.sum()


def choose_loss(
    model: Any, head: HeadSpec, chunk_tokens: int, device: torch.device, autocast: Any, dtype: torch.dtype
) -> tuple[LossFunction, Replacement]:
    """The chunked loss where it equals the model's own, else the model's own, with the reason.

    Args:
        autocast: the context of the run, entered for both.
        dtype: of the run, for the tolerance.
    """
    path, old = "lm_head", "loss from all logits"
    because = _not_plain(_base(model).get_output_embeddings())
    if because:
        return own_logits_loss, Replacement(path=path, old=old, new="", because=because)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), autocast:
            same, because = _probe(model, head, device, PROBE_TOLERANCE[dtype])
    finally:
        model.train(training)
    if not same:
        return own_logits_loss, Replacement(path=path, old=old, new="", because=because)
    because = f"{because}; only {chunk_tokens} supervised tokens' logits exist at once"
    new = "chunked loss of supervised tokens"
    return chunked_loss(head, chunk_tokens), Replacement(path=path, old=old, new=new, because=because)


def _not_plain(output: Any) -> str:
    """Why the chunked loss cannot use this head; ``""`` when it can."""
    if type(output) is not torch.nn.Linear:
        kind = type(output)
        return f"the head is {kind.__module__.partition('.')[0]}'s {kind.__name__}, not torch's Linear"
    return "the head is trained, and the chunked loss gives it no gradient" if output.weight.requires_grad else ""


def _probe(model: Any, head: HeadSpec, device: torch.device, tolerance: float) -> tuple[bool, str]:
    """Whether hidden states, head and ``HeadSpec`` give the model's own logits of a few tokens, and in words.

    Logits, not losses: where they are small every loss is log(vocab), whatever was done to them.
    """
    base = _base(model)
    output = base.get_output_embeddings()
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % output.weight.shape[0]
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = getattr(base.base_model(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        return False, f"a {type(base).__name__} does not give its hidden states"
    ours = _logits(hidden[0].to(output.weight.dtype), output.weight, output.bias, head)
    if ours.shape != own.shape:
        return False, f"the head gives {ours.shape[-1]} logits and the model {own.shape[-1]}"
    largest, apart = float(own.abs().max()), float((ours - own).abs().max())
    if not apart <= tolerance * largest:
        return (
            False,
            f"on a probe its logits differ from the model's own by {apart:.2g}, where the largest is {largest:.2g}",
        )
    # With its gradient, and targets in a tensor of their own: the kernel that is compiled here is the first step's.
    rows, targets = hidden[0, :-1].to(output.weight.dtype).detach().requires_grad_(), ids[0, 1:].clone()
    with torch.enable_grad():
        summed = head_loss(rows, output.weight, output.bias, targets, head, PROBE_TOKENS)
    loss = float(summed.detach()) / (PROBE_TOKENS - 1)
    expected = float(torch.nn.functional.cross_entropy(own[:-1], ids[0, 1:]))
    if not abs(loss - expected) <= tolerance * max(1.0, abs(expected)):
        return False, f"on a probe its loss is {loss:.5f}, the model's own {expected:.5f}"
    return True, f"same logits on a probe (loss {loss:.5f})"
