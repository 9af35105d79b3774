"""A micro-batch in parts that hold fewer tokens at once, cut between its documents or rows.

Each part is made by the run's own collator, so that it is what a smaller device batch would have brought. The loss of a
part is its sum over the number of tokens of the whole step, as the micro-batch's is: the parts add up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from nbqlora.engine.head import IGNORED
from nbqlora.train.batch import documents

Batch = dict[str, Any]
# A document's token ids and labels.
Example = dict[str, list[int]]
Collate = Callable[[Sequence[Example]], Batch]


def in_parts(batch: Batch, most_tokens: int, collate: Collate) -> list[Batch]:
    """The batch, cut so that no part but one of a single document has more tokens; uncut where it has no more.

    Args:
        most_tokens: padding counts; 0 for no limit.
    """
    if not most_tokens or batch["input_ids"].numel() <= most_tokens:
        return [batch]
    return [collate(part) for part in _groups(learned(batch), most_tokens, padded=_is_padded(batch))] or [batch]


def count_parts(batch: Batch, most_tokens: int) -> int:
    """How many :func:`in_parts` makes."""
    if not most_tokens or batch["input_ids"].numel() <= most_tokens:
        return 1
    return len(_groups(learned(batch), most_tokens, padded=_is_padded(batch))) or 1


def learned(batch: Batch) -> list[Example]:
    """The documents that count for the loss: what only fills a batch up is left out."""
    found = [(ids.tolist(), labels.tolist()) for ids, labels in documents(batch)]
    return [
        {"input_ids": ids, "labels": labels} for ids, labels in found if any(label != IGNORED for label in labels[1:])
    ]


def _is_padded(batch: Batch) -> bool:
    return batch["input_ids"].shape[0] > 1 or "attention_mask" in batch or "lengths" in batch


def _groups(examples: Sequence[Example], most_tokens: int, *, padded: bool) -> list[list[Example]]:
    """Neighbours together, as many as the limit allows."""
    groups: list[list[Example]] = []
    for example in examples:
        lengths = [len(e["input_ids"]) for e in [*(groups[-1] if groups else []), example]]
        size = len(lengths) * max(lengths) if padded else sum(lengths)
        if groups and size <= most_tokens:
            groups[-1].append(example)
        else:
            groups.append([example])
    return groups
