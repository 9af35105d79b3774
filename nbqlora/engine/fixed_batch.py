"""Batches of few shapes, so that a captured step fits all of them.

Tokens are filled up to a multiple of an eighth of the longest batch, the filling being a document of its own without
loss (or more padding on the right, where rows are padded). Document boundaries are filled up to a power of two with
empty documents. Which tokens are learned is found here too when the batch comes from a collator, on the host, so that
nobody has to ask the card for their number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbqlora.engine.head import IGNORED

# Shapes that a batch of at most so many tokens can have, and the smallest step between two of them.
SHAPES = 8
LEAST_STEP = 64
LEAST_DOCUMENTS = 8


def fixed_batch(
    batch: Mapping[str, Any], *, most_tokens: int, pad_token_id: int, longest_document: int | None = None
) -> dict[str, torch.Tensor]:
    """The same batch in one of few shapes.

    Args:
        batch: ``input_ids`` and ``labels`` ``[rows, seq]``; ``position_ids`` and ``cu_seq_lens_q`` where documents
            lie end to end; an ``attention_mask`` that only pads on the right is dropped.
        most_tokens: of the longest row that will come.
        longest_document: tokens that no document exceeds; looked at on the host.

    Returns:
        ``input_ids``, ``labels``, ``position_ids`` ``[rows, seq]``; ``boundaries`` int32 ``[documents + 1]`` where
        there are documents; on the host also what :func:`supervised` finds.

    Raises:
        ValueError: a document is longer than it may be: attention would leave its end out.
    """
    ids, labels = batch["input_ids"], batch["labels"]
    rows, seq = ids.shape
    positions = batch.get("position_ids")
    boundaries = _boundaries(batch, positions, rows, seq)
    more = filled(seq, most_tokens) - seq
    if positions is None:
        positions = torch.arange(seq, device=ids.device).expand(rows, -1)
    positions = positions.expand(rows, -1)
    # Filling behind one document a row goes on counting; behind several it is a document of its own.
    ahead = torch.arange(more, device=ids.device) + (seq if boundaries is None else 0)
    fixed = {
        "input_ids": torch.nn.functional.pad(ids, (0, more), value=pad_token_id),
        "labels": torch.nn.functional.pad(labels, (0, more), value=IGNORED),
        "position_ids": torch.cat([positions, ahead.expand(rows, -1)], dim=1),
    }
    if boundaries is not None:
        _check_lengths(boundaries, longest_document)
        fixed["boundaries"] = _filled(boundaries, seq, seq + more)
    if ids.device.type == "cpu":
        fixed["places"], fixed["targets"] = supervised(fixed["labels"])
    return fixed


def supervised(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Flat positions whose next token is learned ``[n]``, and those tokens ``[n]``."""
    following = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    places = (following != IGNORED).nonzero()[:, 0]
    return places, following[places]


def longest_of(documents: int, most_tokens: int) -> int:
    """Tokens that no document of a fixed batch exceeds, the filling being one.

    Args:
        documents: tokens that none of the batch's own exceeds.
    """
    return max(documents, _step(most_tokens))


def filled(tokens: int, most_tokens: int) -> int:
    """Tokens of a row when it was filled up."""
    step = _step(most_tokens)
    return -(-tokens // step) * step


def _step(most_tokens: int) -> int:
    eighth = -(-most_tokens // SHAPES)
    return max(LEAST_STEP, -(-eighth // LEAST_STEP) * LEAST_STEP)


def _boundaries(batch: Mapping[str, Any], positions: torch.Tensor | None, rows: int, seq: int) -> torch.Tensor | None:
    """Where documents begin and end, int32; None where each row is one."""
    given = batch.get("cu_seq_lens_q")
    if given is not None:
        return given.flatten().to(torch.int32)
    if positions is None or rows > 1:
        return None
    starts = (positions.expand(rows, -1).flatten() == 0).nonzero()[:, 0]
    return torch.cat([starts, starts.new_tensor([rows * seq])]).to(torch.int32) if starts.numel() > 1 else None


def _check_lengths(boundaries: torch.Tensor, longest: int | None) -> None:
    if longest is None or boundaries.device.type != "cpu":
        return
    found = int(boundaries.diff().max())
    if found > longest:
        raise ValueError(f"a document of {found} tokens, where none has more than {longest}")


def _filled(boundaries: torch.Tensor, real: int, tokens: int) -> torch.Tensor:
    """Boundaries with the filling as one more document, then empty ones up to a power of two."""
    inner = boundaries[:-1]
    ends = [real, tokens] if tokens > real else [real]
    n = inner.numel() + len(ends) - 1
    wanted = max(LEAST_DOCUMENTS, 1 << (n - 1).bit_length())
    return torch.cat([inner, inner.new_tensor(ends + [tokens] * (wanted - n))])
