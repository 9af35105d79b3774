"""How much memory models of usual sizes need, computed, beside what is usually said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain


@dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """One model shape; bytes are those that a run allocates (``vram_gib``), without CUDA's context and a reserve.

    Args:
        shape: ``"8B"``.
        like: a model that has it.
        minimum_bytes: the smallest card memory for which there is a plan, one row at a time, nothing on the host.
        offloaded_bytes: the same with the layers' inputs in host memory.
        host_bytes: what those take there.
        recommended_bytes: the smallest card memory with which a step takes at most ``within`` longer than with all the
            memory there could be, nothing on the host.
        recommended_rows: rows of a micro-batch then.
        all_kept_bytes: what the fastest step takes.
        slower: how much longer a step takes at the minimum than with all memory: 0.6 for 60 %.
        cards_gb: nominal sizes of the smallest usual cards that have the minimum and the recommended bytes free.
        rule_of_thumb: what is usually said: minimum and recommended VRAM, batch.
        on_80_gb: what one card of 80 GB does, in words.
    """

    shape: str
    like: str
    minimum_bytes: int
    offloaded_bytes: int
    host_bytes: int
    recommended_bytes: int
    recommended_rows: int
    all_kept_bytes: int
    slower: float
    cards_gb: tuple[int | None, int | None]
    rule_of_thumb: str
    on_80_gb: str


@dataclass(frozen=True, kw_only=True, repr=False)
class MemoryTable(Displayed):
    """A row for each shape.

    Args:
        max_length: tokens of a row; every row is full, and all of it is learned.
        card: whose speeds were compared.
        settings: what differs from the defaults.
        within: share of a step that ``recommended_bytes`` may cost.
    """

    rows: tuple[MemoryRow, ...]
    max_length: int
    card: str
    dtype: str
    within: float
    settings: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found: dict[str, Any] = plain(self)
        return found

    def __repr__(self) -> str:
        return f"MemoryTable({', '.join(r.shape for r in self.rows)}; rows of {self.max_length} tokens, {self.card})"
