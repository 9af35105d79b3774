"""What every source of rows becomes: something that can be read from its start, more than once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Numbered = Iterator[tuple[int, Row]]


@dataclass(frozen=True, kw_only=True, repr=False)
class Rows:
    """Rows as they come, not yet looked into.

    Args:
        source: what they come from, for plans and errors.
        n_rows: how many; None where only reading them through would tell.
        read: number in the source (from 1) and row, from the start at each call.
        unit: what the number counts: "row", or "line" of a text file.
    """

    source: str
    n_rows: int | None
    read: Callable[[], Numbered]
    unit: str = "row"

    def __iter__(self) -> Numbered:
        return self.read()

    def __repr__(self) -> str:
        return f"Rows({self.source}{'' if self.n_rows is None else f': {self.n_rows} rows'})"
