"""Whether documents laid end to end stay apart in this model: measured, not looked up in a list of families.

Three questions on a few short documents. Do the position ids restart at each document? Are each document's
losses, and the gradients, those that the documents have alone? And when one document's tokens are changed,
do the losses of the others stay as they were? The last one is sharp even in half precision: what is masked
has a weight of exactly zero, so nothing may move but rounding. State-space layers that carry their state on,
convolutions that look across a boundary and masks that ignore positions all show; soft caps, sinks and
sliding windows pass where they are right.

Cost: one backward for each document, one for all, one forward more; nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

# documents' token ids -> the batch that the trainer's collator makes of them, end to end
Collate = Callable[[Sequence[Sequence[int]]], dict[str, Any]]

# Largest difference: of a token's loss, as a share of the largest; of the gradients' norm, as a share of it.
# Half precision: other shapes round elsewhere. Measured on tiny models of 28 families in fp32: losses to 1e-7 and
# gradients to 7e-7 where documents stay apart; losses moved by 1 % and more where they do not.
TOLERANCE = {
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (5e-2, 1e-1),
    torch.float16: (1e-2, 3e-2),
}
# Tokens of the documents that are compared: enough for every boundary, few enough to cost nothing.
PROBE_TOKENS = (9, 14, 6)


@dataclass(frozen=True, kw_only=True)
class PackingProbe:
    """What the probe found, and in words what it measured."""

    exact: bool
    because: str


def probe_packing(
    model: torch.nn.Module,
    documents: Sequence[Sequence[int]],
    collate: Collate,
    *,
    context: Callable[[], AbstractContextManager[Any]],
    dtype: torch.dtype,
) -> PackingProbe:
    """Compare documents end to end with the same documents alone.

    Args:
        model: with at least one parameter that takes a gradient; left as it was, without gradients.
        documents: token ids of at least two documents, two tokens each at least.
        collate: makes the batch that training would see.
        context: entered around each forward (autocast).
        dtype: of the arithmetic, for the tolerance.
    """
    training = model.training
    model.eval()
    try:
        return _probe(model, [list(d) for d in documents], collate, context, TOLERANCE[dtype])
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)


def _probe(
    model: torch.nn.Module,
    documents: list[list[int]],
    collate: Collate,
    context: Callable[[], AbstractContextManager[Any]],
    tolerance: tuple[float, float],
) -> PackingProbe:
    joined = collate(documents)
    wrong = _positions(joined, documents)
    if wrong:
        return PackingProbe(exact=False, because=wrong)
    device = joined["input_ids"].device
    alone, apart_gradient = _run(model, [{"input_ids": torch.tensor([d], device=device)} for d in documents], context)
    try:
        together, gradient = _run(model, [joined], context)
    except (ValueError, NotImplementedError) as error:
        # How a family says that it cannot: transformers' convolutions without the kernels that take boundaries.
        return PackingProbe(exact=False, because=f"this model takes no documents end to end: {_first_line(error)}")
    if not bool(alone.isfinite().all()):
        return PackingProbe(exact=True, because="not probed: these rows have no finite loss, end to end or alone")
    # The loss of a document's first token is not counted: nothing of its own predicts it.
    together = torch.cat([part[1:] for part in together.split([len(d) for d in documents])])
    alone = torch.cat([part[1:] for part in alone.split([len(d) for d in documents])])
    scale = float(alone.abs().max())
    loss_off = float((together - alone).abs().max()) / scale
    gradient_off = float((gradient - apart_gradient).norm() / apart_gradient.norm().clamp(min=1e-30))
    leak = _leak(model, documents, collate, context) / scale
    measured = f"losses alike to {loss_off:.0e}, gradients to {gradient_off:.0e}"
    if leak > tolerance[0]:
        return PackingProbe(
            exact=False, because=f"documents leak: one moves the next one's losses by {leak:.1%} (probe)"
        )
    if not (loss_off <= tolerance[0] and gradient_off <= tolerance[1]):
        return PackingProbe(exact=False, because=f"end to end is not as alone: {measured} only (probe)")
    return PackingProbe(exact=True, because=f"probe: {len(documents)} documents end to end and alone, {measured}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _positions(batch: dict[str, Any], documents: list[list[int]]) -> str:
    """What is wrong with the batch's position ids; ``""`` when they restart at each document."""
    expected = torch.cat([torch.arange(len(d)) for d in documents])
    found = batch.get("position_ids")
    if found is None or not torch.equal(found.flatten().cpu(), expected):
        return "the position ids do not restart at each document"
    # All ones beside restarting positions make transformers build one causal mask over everything.
    return "an attention mask lies beside the position ids" if "attention_mask" in batch else ""


def _run(
    model: torch.nn.Module, batches: list[dict[str, Any]], context: Callable[[], AbstractContextManager[Any]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each token ``[tokens]`` (0 for each batch's first) and the sum's gradient, one flat tensor, both fp32."""
    model.zero_grad(set_to_none=True)
    losses = []
    for batch in batches:
        token_losses = _token_losses(model, batch, context)
        token_losses[_counted(batch)].sum().backward()
        losses.append(token_losses.detach())
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return torch.cat(losses), torch.cat(gradients)


def _counted(batch: dict[str, Any]) -> torch.Tensor:
    """Tokens that one of their own document predicts."""
    positions = batch.get("position_ids")
    if positions is None:
        positions = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    return (positions != 0).flatten()


def _token_losses(
    model: torch.nn.Module, batch: dict[str, Any], context: Callable[[], AbstractContextManager[Any]]
) -> torch.Tensor:
    """``[tokens]`` in fp32; the first one is 0, as nothing predicts it."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with context():
        logits = model(**inputs, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1].float(), batch["input_ids"][0, 1:], reduction="none")
    return torch.nn.functional.pad(losses, (1, 0))


def _leak(
    model: torch.nn.Module,
    documents: list[list[int]],
    collate: Collate,
    context: Callable[[], AbstractContextManager[Any]],
) -> float:
    """How far the losses of the later documents move when the first one's tokens are turned round."""
    first, *later = documents
    with torch.no_grad():
        before, after = (
            _token_losses(model, collate([tokens, *later]), context)[len(first) :] for tokens in (first, first[::-1])
        )
    counted = _counted(collate(documents))[len(first) :]
    return float((after - before)[counted].abs().max())
