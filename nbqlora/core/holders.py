"""Who holds memory in a notebook by name, and what was given back. Values without tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain
from nbqlora.core.units import format_bytes

HolderKind = Literal["variable", "output", "error", "run", "pool", "cache", "rest"]
AUTOMATIC: frozenset[HolderKind] = frozenset({"output", "error", "run", "cache"})
"""Kinds that ``%vram --free`` lets go of. Variables are the user's."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """One name that keeps memory.

    Args:
        name: as it is written in a cell (``model``, ``Out[5]``), or in words.
        card_bytes: on the card; each storage counts for the first holder that reaches it.
        ram_bytes: in RAM.
        note: what else a reader should know ("also Out[5]").
    """

    kind: HolderKind
    name: str
    card_bytes: int = 0
    ram_bytes: int = 0
    note: str = ""

    @property
    def automatic(self) -> bool:
        """``%vram --free`` lets go of it."""
        return self.kind in AUTOMATIC


@dataclass(frozen=True, kw_only=True, repr=False)
class HoldersReport(Displayed):
    """Who holds memory.

    Args:
        has_card: torch has memory on a card; else only RAM is told.
        holders: largest first within their kinds.
    """

    has_card: bool
    holders: tuple[Holder, ...]
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        total = sum(h.card_bytes if self.has_card else h.ram_bytes for h in self.holders)
        return f"HoldersReport({len(self.holders)} holders, {format_bytes(total)})"


@dataclass(frozen=True, kw_only=True)
class Freed:
    """What one kind of holder gave back.

    Args:
        what: in words ("the last error").
        names: what was let go of; () when there was nothing.
    """

    what: str
    names: tuple[str, ...]
    card_bytes: int
    ram_bytes: int


@dataclass(frozen=True, kw_only=True, repr=False)
class FreedReport(Displayed):
    """What ``%vram --free`` gave back, in the order in which it let go."""

    has_card: bool
    freed: tuple[Freed, ...]

    @property
    def total_bytes(self) -> int:
        """Given back, on the card where there is one."""
        return sum(f.card_bytes if self.has_card else f.ram_bytes for f in self.freed)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        return f"FreedReport({format_bytes(self.total_bytes)} given back)"
