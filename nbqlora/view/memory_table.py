"""The table of how much memory usual models need, as text and HTML."""

from __future__ import annotations

import textwrap
from html import escape

from nbqlora.core import display
from nbqlora.core.memory_table import MemoryRow, MemoryTable
from nbqlora.core.units import format_bytes
from nbqlora.view.html import block

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
HEADS = ("model", "minimum", "inputs in host RAM", "recommended", "rows at once", "rule of thumb")
WIDTH = 118


def register_memory_table_view() -> None:
    """Let ``MemoryTable`` show itself through this module."""
    display.register(MemoryTable, text=table_text, html=table_html)


def table_title(table: MemoryTable) -> str:
    """What was planned for."""
    settings = "".join(f", {name} = {value}" for name, value in table.settings.items())
    card = f"{table.dtype} on a card like {table.card}"
    return f"VRAM that a run allocates, rows of {table.max_length} tokens, {card}{settings}"


def table_cells(table: MemoryTable) -> list[tuple[str, ...]]:
    """A row of cells for each shape."""
    return [_cells(row) for row in table.rows]


def table_notes(table: MemoryTable) -> list[str]:
    """What the columns mean, and what a card of 80 GB does where tables say that it takes more than one."""
    longer = f"at most {table.within * 100:.0f} % longer than with all memory"
    found = [
        "minimum: the least with which there is a plan, one row at a time, all layers computed again; a step takes "
        + ", ".join(f"{row.slower * 100:.0f} %" for row in table.rows)
        + " longer than with all memory",
        f"recommended: the least with which a step takes {longer}, and its rows at once; both without host RAM",
        "in brackets: the smallest usual card with so much free, beside 0.4 GiB for CUDA and 0.5 GiB in reserve",
        "bytes are counted tensor by tensor; seconds are a forecast, checked on an H100 alone",
    ]
    large = [row for row in table.rows if "80+" in row.rule_of_thumb]
    return found + [f"{row.shape} on one 80 GB card: {row.on_80_gb}" for row in large]


def table_text(table: MemoryTable) -> str:
    """Aligned columns, then the notes."""
    cells = [HEADS, *table_cells(table)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(HEADS))]
    lines = ["  " + "  ".join(f"{cell:<{n}}" for cell, n in zip(row, widths, strict=True)).rstrip() for row in cells]
    for note in table_notes(table):
        lines += textwrap.wrap(note, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([table_title(table), *lines])


def table_html(table: MemoryTable) -> str:
    """The same as a table."""
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(h)}</th>' for h in HEADS)
    rows = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(first)}</th>'
        + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in rest)
        + "</tr>"
        for first, *rest in table_cells(table)
    )
    notes = "".join(f'<p style="margin:2px 0;font-size:12px">{escape(note)}</p>' for note in table_notes(table))
    body = f'<table style="border-collapse:collapse;margin:4px 0;font-size:13px"><tr>{head}</tr>{rows}</table>{notes}'
    return block(table_title(table), body)


def _cells(row: MemoryRow) -> tuple[str, ...]:
    minimum, recommended = (f" ({n} GB)" if n else "" for n in row.cards_gb)
    return (
        f"{row.shape} ({row.like})",
        f"{format_bytes(row.minimum_bytes)}{minimum}",
        f"{format_bytes(row.offloaded_bytes)} + {format_bytes(row.host_bytes)} RAM",
        f"{format_bytes(row.recommended_bytes)}{recommended}",
        str(row.recommended_rows),
        row.rule_of_thumb,
    )
