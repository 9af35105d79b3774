"""What is in the data, counted before training: what will be learned, what is cut, what is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain
from nbqlora.core.specs import DataStats

PADDED_ROWS = 8


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
    """One row as the model will see it: pieces of text in order, each with whether the loss counts it.

    Args:
        row: its number in the source, from 1.
        why: why this one ("the first", "of middle length").
        n_tokens: its tokens, before the cut.
        n_cut_tokens: those beyond ``max_length``, which the pieces do not have.
    """

    row: int
    pieces: tuple[tuple[str, bool], ...]
    why: str = ""
    n_tokens: int = 0
    n_cut_tokens: int = 0


@dataclass(frozen=True, kw_only=True, repr=False)
class DataReport(Displayed):
    """The data before training.

    Args:
        n_read: rows that the source held.
        unit: what its rows are called ("row", or "line" of a file).
        histogram: ``(from, to, rows)``: lengths in tokens before the cut, both ends included, of all rows that
            could be tokenized.
        n_cut_tokens: tokens beyond ``max_length``, left away.
        n_cut_learned: those of them that would have been learned.
        n_duplicates: rows whose tokens another row has already; they are kept.
        duplicate_rows: numbers of the first few of those.
        previews: a few rows as they will be seen.
        fill: share of the tokens of a micro-batch that are not padding, or of a pack that is filled; for padded
            rows, of :data:`PADDED_ROWS` rows picked at random.
    """

    stats: DataStats
    n_read: int
    max_length: int
    histogram: tuple[tuple[int, int, int], ...]
    unit: str = "row"
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


def listed(numbers: Sequence[int], count: int, unit: str) -> str:
    """``row 3``, ``rows 3 and 7``, ``rows 3, 7, 9, 12, 15, …``.

    Args:
        numbers: the first few.
        count: how many there are.
        unit: what one is called.
    """
    shown = [f"{n:,}" for n in numbers]
    if count > len(numbers):
        return f"{unit}s {', '.join(shown)}, …"
    return f"{unit} {shown[0]}" if count == 1 else f"{unit}s {', '.join(shown[:-1])} and {shown[-1]}"
