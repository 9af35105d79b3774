"""What is in a batch that TRL's collator made: its tokens, and its documents without padding and pack boundaries."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nbqlora.train.state import Generators


@dataclass(kw_only=True)
class MicroBatch:
    """What is needed to run a batch of the step again, and to name its rows where the loss is not finite.

    Args:
        count: learned tokens of the whole step.
        random: where the generators stood before it ran.
        loss: its share of the step's; filled once it ran.
    """

    inputs: dict[str, Any]
    count: Any
    random: Generators
    loss: torch.Tensor = field(default_factory=lambda: torch.zeros(()))


def count_tokens(inputs: dict[str, Any]) -> int:
    """Tokens that go through the model, padding left out."""
    if "n_tokens" in inputs:
        return int(inputs["n_tokens"])
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def documents(inputs: dict[str, Any]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and labels of each document, ``[seq]`` each."""
    ids, labels = inputs["input_ids"], inputs["labels"]
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return [(a[m.bool()], b[m.bool()]) for a, b, m in zip(ids, labels, mask, strict=True)]
    if "lengths" in inputs:
        lengths = inputs["lengths"].tolist()
        return [(a[:n], b[:n]) for a, b, n in zip(ids, labels, lengths, strict=True)]
    if positions is None:
        return list(zip(ids, labels, strict=True))
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    return [(ids[0, a:b], labels[0, a:b]) for a, b in itertools.pairwise(starts)]


def end_to_end(documents: Sequence[Sequence[int]], *, pad_token_id: int, device: torch.device) -> dict[str, Any]:
    """The batch that TRL's collator makes of documents without padding: ``input_ids`` ``[1, tokens]``, boundaries."""
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    collator = DataCollatorForLanguageModeling(pad_token_id=pad_token_id, padding_free=True)
    batch = collator([{"input_ids": list(d), "labels": list(d)} for d in documents])
    return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def in_few_shapes(collate: Callable[[Any], dict[str, Any]], fix: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A collator whose batches a captured step fits; how many tokens they have without filling is ``n_tokens``."""

    def collated(rows: Any) -> dict[str, Any]:
        batch = collate(rows)
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        known: dict[str, Any] = {"n_tokens": count_tokens(batch)}
        if "position_ids" not in batch:
            known["lengths"] = torch.full(ids.shape[:1], ids.shape[1]) if mask is None else mask.sum(1)
        return {**fix(batch), **known}

    return collated
