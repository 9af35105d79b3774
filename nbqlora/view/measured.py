"""A run's measured memory beside what its plan said: two lines of text, or two small tables.

Loss and activations are one row, on a card with the workspaces of libraries: the plan knows them apart, what was
measured does not.
"""

from __future__ import annotations

from html import escape

from nbqlora.core.memory_profile import MemoryProfile
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import MemoryCategory
from nbqlora.core.units import format_bytes

Row = tuple[str, str, str]
LABELS = ("phases", "holders")

_TABLE = "border-collapse:collapse;margin:4px 24px 4px 0;font-size:13px;display:inline-table;vertical-align:top"
_CELL = "text-align:left;padding:1px 12px 1px 0"
_FIGURE = "text-align:right;padding:1px 12px 1px 0;font-variant-numeric:tabular-nums"


def measured_rows(profile: MemoryProfile, budget: MemoryBudget) -> list[Row]:
    """``phases  highest in backward  load 5.9 GiB · …``, ``holders  measured (planned)  weights 5.3 GiB (5.3 GiB)``."""
    if profile.highest is None:
        return []
    peaks = " · ".join(f"{p.phase} {format_bytes(p.peak_bytes)}" for p in profile.phases)
    held = " · ".join(f"{label} {measured} ({planned})" for label, measured, planned in _holders(profile, budget))
    phases, holders = LABELS
    return [(phases, f"highest in {profile.highest.phase}", peaks), (holders, "measured (planned)", held)]


def measured_html(profile: MemoryProfile, budget: MemoryBudget) -> str:
    """Peaks by phase, and holders at the peak with the plan's figures; "" before training began."""
    if profile.highest is None:
        return ""
    peaks = [(p.phase, format_bytes(p.peak_bytes), format_bytes(p.after_bytes)) for p in profile.phases]
    return _table(("phase", "peak", "left"), peaks) + _table(
        ("at the peak", "measured", "planned"), _holders(profile, budget)
    )


def _holders(profile: MemoryProfile, budget: MemoryBudget) -> list[Row]:
    """Holder, measured, planned; whoever has neither is left out."""
    measured, planned, m = dict(profile.by_category), dict(budget.by_category), MemoryCategory
    on_card = profile.kind == "cuda"
    parts = [planned.pop(c, 0) for c in (m.ACTIVATIONS, m.LOSS, *([m.CONTEXT] if on_card else []))]
    planned[m.ACTIVATIONS] = sum(parts)
    names = {m.ACTIVATIONS: "activations, loss, workspaces" if on_card else "activations, loss"}
    return [
        (names.get(c, c.label), format_bytes(measured.get(c, 0)), format_bytes(planned.get(c, 0)))
        for c in m
        if measured.get(c, 0) or planned.get(c, 0)
    ]


def _table(heads: Row, rows: list[Row]) -> str:
    first, *figures = heads
    head = f'<th scope="col" style="{_CELL}">{first}</th>' + "".join(
        f'<th scope="col" style="{_FIGURE}">{name}</th>' for name in figures
    )
    body = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(label)}</th>'
        + "".join(f'<td style="{_FIGURE}">{escape(figure)}</td>' for figure in values)
        + "</tr>"
        for label, *values in rows
    )
    return f'<table style="{_TABLE}"><tr>{head}</tr>{body}</table>'
