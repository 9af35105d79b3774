r"""Loss of the supervised tokens only, in chunks, so that no ``[tokens, vocab]`` tensor is ever kept.

Formula: with h ``[n, d_model]`` the hidden states that predict a supervised token, W ``[vocab, d_model]``
and t the targets, ``loss = sum_i logsumexp(z_i) - z_i[t_i]`` where ``z = cap(scale * (h W^T + b))``.
The head is frozen, so the gradient with respect to h is all that backward needs; it is made in the
forward, chunk by chunk, while the logits exist: ``dh = scale * (softmax(z) - onehot(t)) * cap'(z) W``.

Cost: one chunk of logits (``chunk * vocab * 10`` bytes in half precision: the product, its fp32 copy, its
gradient) instead of all of them; the same arithmetic. TRL's fused loss does this only where Triton runs,
and scores every position elsewhere: on two CPU cores that was 42 % of a step.

Whether this is the same loss as the model's own is not assumed: :func:`choose_loss` compares both on a few
tokens and leaves the model's own head in place where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import HeadSpec

IGNORED = -100
PROBE_TOKENS = 12
PROBE_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}

# model, batch -> (sum of the losses of the supervised tokens, their number), both 0-d tensors
LossFunction = Callable[[Any, dict[str, Any]], tuple[torch.Tensor, torch.Tensor]]


def head_loss_reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, head: HeadSpec
) -> torch.Tensor:
    """The formula in one piece, for tests: hidden ``[n, d_model]``, targets ``[n]`` -> 0-d sum."""
    logits = torch.nn.functional.linear(hidden, weight, bias).float() * (head.logit_factor / head.logit_divisor)
    if head.logit_softcap:
        logits = head.logit_softcap * torch.tanh(logits / head.logit_softcap)
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


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
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for begin in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(begin, begin + chunk_tokens)
            total += _chunk(
                hidden[rows], weight, bias, targets[rows], head, None if gradient is None else gradient[rows]
            )
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None, None, None, None


def _chunk(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: HeadSpec,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    scale = head.logit_factor / head.logit_divisor
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    if scale != 1.0:
        logits *= scale
    slope: torch.Tensor | None = None
    if head.logit_softcap:
        logits = torch.tanh(logits / head.logit_softcap)
        slope = 1 - logits * logits
        logits = logits * head.logit_softcap
    lse = torch.logsumexp(logits, dim=-1)
    picked = logits.gather(1, targets[:, None])[:, 0]
    if gradient is not None:
        probabilities = torch.exp_(logits.sub_(lse[:, None]))
        probabilities.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0)[:, None])
        if slope is not None:
            probabilities *= slope
        torch.mm((probabilities * scale if scale != 1.0 else probabilities).to(weight.dtype), weight, out=gradient)
    return (lse - picked).sum()


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
    output = _base(model).get_output_embeddings()
    path, old = "lm_head", "loss from all logits"
    if not isinstance(getattr(output, "weight", None), torch.Tensor) or type(output) is not torch.nn.Linear:
        because = f"the head is a {type(output).__name__}, not a plain linear"
        return own_logits_loss, Replacement(path=path, old=old, new="", because=because)
    if output.weight.requires_grad:
        because = "the head is trained, and the chunked loss gives it no gradient"
        return own_logits_loss, Replacement(path=path, old=old, new="", because=because)
    chunked = chunked_loss(head, chunk_tokens)
    ids = torch.arange(1, PROBE_TOKENS + 1, device=device)[None] % output.weight.shape[0]
    batch = {"input_ids": ids, "labels": ids}
    training = model.training
    model.eval()
    with torch.no_grad(), autocast:
        ours, own = (float(f(model, batch)[0]) / (PROBE_TOKENS - 1) for f in (chunked, own_logits_loss))
    model.train(training)
    if abs(ours - own) > PROBE_TOLERANCE[dtype] * max(1.0, abs(own)):
        because = f"on a probe it gives {ours:.5f} where the model's own logits give {own:.5f}"
        return own_logits_loss, Replacement(path=path, old=old, new="", because=because)
    because = f"same loss on a probe ({ours:.5f}); only {chunk_tokens} supervised tokens' logits exist at once"
    return chunked, Replacement(path=path, old=old, new="chunked loss of supervised tokens", because=because)
