"""What a call of the model asks for: where documents begin, and whether its mask can be ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbqlora.engine.attention import Documents, count_documents, documents_from_positions


def padded_on_the_right(mask: Any) -> bool:
    """Whether a causal layer may ignore this mask: there is none, or it only hides what stands behind a row.

    Nothing real attends to padding behind it, and what padding computes is not looked at.
    """
    if mask is None:
        return True
    if not isinstance(mask, torch.Tensor) or mask.dim() != 2:
        return False
    seen = mask != 0
    return bool((seen[:, :1].all() & (seen[:, 1:] <= seen[:, :-1]).all()).item())


def documents_of(ids: torch.Tensor, kwargs: Mapping[str, Any]) -> Documents:
    """Where documents begin in a call: as the collator says, else where positions restart, else one a row."""
    rows, seq = ids.shape[:2]
    boundaries, positions = kwargs.get("cu_seq_lens_q"), kwargs.get("position_ids")
    if boundaries is not None:
        cu = boundaries.flatten().to(torch.int32)
        longest = int(kwargs.get("max_length_q") or seq)
        return Documents(rows=rows, seq=seq, cu_seqlens=cu, max_tokens=longest, lengths=_lengths(cu))
    if positions is not None and positions.dim() == 2:
        positions = positions.expand(rows, -1)
        n = count_documents(positions)
        if n > rows:
            cu = documents_from_positions(positions, max_documents=n)
            return Documents(rows=rows, seq=seq, cu_seqlens=cu, max_tokens=seq, lengths=_lengths(cu))
    return Documents(rows=rows, seq=seq, cu_seqlens=None, max_tokens=seq, lengths=None)


def _lengths(boundaries: torch.Tensor) -> tuple[int, ...] | None:
    """Known on the host where that costs nothing."""
    return tuple(boundaries.diff().tolist()) if boundaries.device.type == "cpu" else None
