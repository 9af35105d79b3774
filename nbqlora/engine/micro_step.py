"""One micro-batch: loss and gradients, captured where it can be, else eagerly; the same values either way.

The trainer and a loop of one's own both come through here, so that the step which was measured is the one that runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.attention import AttentionKind
from nbqlora.engine.calls import padded_on_the_right
from nbqlora.engine.captured_step import CapturedStep
from nbqlora.engine.fixed_batch import fixed_batch, longest_of
from nbqlora.engine.fused import Engine, engine_of
from nbqlora.engine.head import LossFunction, own_logits_loss
from nbqlora.engine.host_embedding import embedding_is_on_host

# With more tokens in a row a step waits for its kernels, not for their launches (16,149 tokens/s of an 8B on an H100:
# a second, in which 6,500 launches take 0.2 s and run ahead), and a graph would hold the gradient of the hidden states
# a second time, those of the other lengths beside it: 0.75 GiB each with 98,304 tokens of 4,096.
CAPTURED_TOKENS = 16384
CAPTURED_KINDS = (AttentionKind.FLASH, AttentionKind.CUDNN, AttentionKind.EFFICIENT)


def not_captured_because(
    engine: Engine | None,
    device: torch.device,
    loss: LossFunction,
    *,
    row_tokens: int = 0,
    embedding_on_host: bool = False,
) -> str:
    """Why a step on this model is not captured; "" where it is.

    Args:
        row_tokens: of the longest row, what lies end to end being one.
        embedding_on_host: where its rows are looked up.
    """
    if device.type != "cuda":
        return "a CPU has no graphs to capture"
    if engine is None or not engine.complete:
        return "not every layer is a fused one"
    if engine.last_norm is None:
        return "its last norm is of another kind"
    if loss is own_logits_loss:
        return "the loss is computed from the model's own logits"
    if engine.shards is not None:
        return "each layer's weights are gathered from all cards when its turn comes"
    if embedding_on_host:
        return "the embedding is looked up in host memory"
    for layer in engine.layers.values():
        kinds = {engine.kind_for(layer, dense=dense) for dense in (True, False)}
        if not kinds <= set(CAPTURED_KINDS):
            return "its attention is computed document by document"
    if row_tokens > CAPTURED_TOKENS:
        return f"rows of more than {CAPTURED_TOKENS:,} tokens keep the card busy, and graphs would hold memory"
    return ""


class MicroStep:
    """Runs micro-batches of one model.

    Args:
        model: with its adapters.
        loss: of a batch, summed, and the number of tokens that it counts.
        head: what happens to logits.
        chunk_tokens: supervised tokens whose logits exist at once.
        most_tokens: of the longest row that will come.
        longest_document: tokens that no document exceeds.
        pad_token_id: fills batches up.
        autocast: makes the context that a forward runs in.
        capture: False for eager steps only.
        replay: False runs batches that :attr:`fix` made eagerly too: there was no room to capture a step.
    """

    def __init__(
        self,
        model: Any,
        loss: LossFunction,
        head: HeadSpec,
        *,
        chunk_tokens: int,
        most_tokens: int,
        longest_document: int,
        pad_token_id: int,
        autocast: Any,
        device: torch.device,
        capture: bool = True,
        replay: bool = True,
    ) -> None:
        self._model, self._loss, self._autocast, self._replay = model, loss, autocast, replay
        self._engine = engine_of(model)
        self.fix = partial(
            fixed_batch, most_tokens=most_tokens, pad_token_id=pad_token_id, longest_document=longest_document
        )
        because = not_captured_because(
            self._engine, device, loss, row_tokens=most_tokens, embedding_on_host=embedding_is_on_host(model)
        )
        self.eager_because = because if capture else "switched off"
        self._captured: CapturedStep | None = None
        if not self.eager_because and self._engine is not None:
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            self._captured = CapturedStep(
                self._engine,
                base,
                head,
                chunk_tokens=chunk_tokens,
                longest_document=longest_of(longest_document, most_tokens),
                autocast=autocast,
            )

    @property
    def captures(self) -> bool:
        """Whether batches come in few shapes, and steps are captured from the second one of a shape on."""
        return self._captured is not None

    @property
    def broke_off_capture(self) -> bool:
        """Whether the last call ended in the middle of a capture."""
        return self._captured is not None and self._captured.capturing

    def __call__(self, batch: Mapping[str, Any], factor: torch.Tensor) -> torch.Tensor:
        """Add the gradients of ``factor`` times the summed loss; return the summed loss, 0-d fp32.

        Args:
            batch: as a collator makes it, or as :attr:`fix` made it.
            factor: 0-d fp32 on the model's device: loss scale over the number of tokens of the step.
        """
        if self._captured is None or self._engine is None:
            return self._eager(batch, factor)
        if "n_tokens" not in batch:  # not from a collator that fixed it
            if not padded_on_the_right(batch.get("attention_mask")):
                return self._eager(batch, factor)
            batch = self.fix(batch)
        found = self._captured.run(dict(batch), factor) if self._replay else None
        if found is not None:
            return found
        self._engine.given = self._captured.documents(dict(batch))
        try:
            return self._eager({k: batch[k] for k in ("input_ids", "labels", "position_ids")}, factor)
        finally:
            self._engine.given = None

    def _eager(self, batch: Mapping[str, Any], factor: torch.Tensor) -> torch.Tensor:
        with self._autocast():
            total, _ = self._loss(self._model, dict(batch))
        (total * factor).backward()
        return total.detach()

    def release(self) -> None:
        """Drop what was captured, and the memory that it holds."""
        if self._captured is not None:
            self._captured.release()
