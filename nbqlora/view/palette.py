"""One colour for each holder of memory, the same in every bar and figure.

Twelve hues cannot be told apart by everyone, so lightness differs too: any two of these are at least 13 apart
in CIELAB, also as seen with protanopia, deuteranopia and tritanopia (Machado's matrices; checked in
``tests/view``). They stand on white and on dark pages. No view relies on colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from nbqlora.core.specs import MemoryCategory

COLOURS: Mapping[MemoryCategory, str] = {
    MemoryCategory.WEIGHTS: "#426EBD",
    MemoryCategory.ADAPTER: "#71D0F5",
    MemoryCategory.GRADIENTS: "#31865A",
    MemoryCategory.OPTIMIZER: "#E4C22D",
    MemoryCategory.ACTIVATIONS: "#E88543",
    MemoryCategory.DEQUANT: "#7C4293",
    MemoryCategory.LOSS: "#E296D0",
    MemoryCategory.THIS_PROCESS: "#35AD80",
    MemoryCategory.CONTEXT: "#6F6F6F",
    MemoryCategory.CACHE: "#6C96A7",
    MemoryCategory.LEAKED: "#D32224",
    MemoryCategory.OTHER_PROCESSES: "#BDBDBD",
}

RECLAIMABLE: frozenset[MemoryCategory] = frozenset({MemoryCategory.CACHE})
"""Used, but given back on demand: drawn hatched."""

_BY_LABEL = {category.label: category for category in MemoryCategory}


def category_of(label: str) -> MemoryCategory | None:
    """The holder that ``label`` names, None for a word of another list."""
    return _BY_LABEL.get(label)
