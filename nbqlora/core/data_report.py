"""What is in the data, counted before training: what will be learned, what is cut, what is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain
from nbqlora.core.specs import DataStats


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Rows left out for one reason.

    Args:
        rows: numbers in the source of the first few, from 1.
    """

    reason: str
    count: int
    rows: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Preview:
    """One row as the model will see it: pieces of text in order, each with whether the loss counts it."""

    row: int
    pieces: tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True, repr=False)
class DataReport(Displayed):
    """The data before training.

    Args:
        n_read: rows that the source held.
        histogram: ``(from, to, rows)``: row lengths in tokens before the cut, both ends included.
        n_cut_tokens: tokens beyond ``max_length``, left away.
        n_cut_learned: those of them that would have been learned.
        n_duplicates: rows whose tokens another row has already; they are kept.
        duplicate_rows: numbers of the first few of those.
        previews: a few rows as they will be seen.
        fill: share of the tokens of a micro-batch that are not padding, or of a pack that is filled.
    """

    stats: DataStats
    n_read: int
    max_length: int
    histogram: tuple[tuple[int, int, int], ...]
    n_cut_tokens: int = 0
    n_cut_learned: int = 0
    n_duplicates: int = 0
    duplicate_rows: tuple[int, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    previews: tuple[Preview, ...] = ()
    fill: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; the previews, which hold the user's text, are left out."""
        return {k: v for k, v in plain(self).items() if k != "previews"}

    def __repr__(self) -> str:
        return (
            f"DataReport({self.stats.source}: {self.stats.n_rows} of {self.n_read} rows, {self.stats.n_tokens} tokens)"
        )
