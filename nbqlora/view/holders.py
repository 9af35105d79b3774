"""Who holds memory by name, and what was given back, as aligned lines and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nbqlora.core import display
from nbqlora.core.fit import FitReport
from nbqlora.core.holders import AUTOMATIC, FreedReport, HoldersReport
from nbqlora.core.units import MIB, format_bytes
from nbqlora.view.memory import bar_html

Row = tuple[str, ...]
FREES = "--free"
_FEW = 6
_CELL = "text-align:left;padding:1px 12px 1px 0"
_SHOWN_BYTES = MIB


def register_holder_views() -> None:
    """Let the answers of ``%vram``'s flags show themselves."""
    display.register(HoldersReport, text=holders_text, html=holders_html)
    display.register(FreedReport, text=freed_text, html=freed_html)
    display.register(FitReport, text=fit_text, html=fit_html)


def holders_text(report: HoldersReport) -> str:
    """``who  model  2.1 GiB  yours``, a line for each holder."""
    rows = _holder_rows(report)
    if not rows:
        return "who  nothing of 1 MiB or more is held by this notebook"
    return "\n".join(["who holds memory", *_aligned([_heads(report.has_card), *rows]), *report.notes])


def holders_html(report: HoldersReport) -> str:
    """The same as a table."""
    rows = _holder_rows(report)
    notes = "".join(f'<p style="margin:2px 0;opacity:.8">{escape(note)}</p>' for note in report.notes)
    return _table(_heads(report.has_card), rows) + notes if rows else f"<p>{escape(holders_text(report))}</p>"


def freed_text(report: FreedReport) -> str:
    """``freed  5.6 GiB on the card``, then a line for each kind of holder."""
    return "\n".join([_freed_title(report), *_aligned(_freed_rows(report))])


def freed_html(report: FreedReport) -> str:
    """The same as a table."""
    heads = ("let go of", *_places(report.has_card), "which")
    return f'<p style="margin:4px 0">{escape(_freed_title(report))}</p>' + _table(heads, _freed_rows(report))


def fit_text(report: FitReport) -> str:
    """Whether a model fits, and what would."""
    return "\n".join([_fit_title(report), *(f"  {line}" for line in report.lines)])


def fit_html(report: FitReport) -> str:
    """The same with the plan's bar, where there is a plan."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in report.lines)
    bar = ""
    if report.plan is not None:
        parts = sorted(report.plan.budget.by_category.items(), key=lambda item: -item[1])
        bar = bar_html([(c.label, n) for c, n in parts], report.plan.usable_bytes)
    title = f'<p style="margin:4px 0"><strong>{escape(_fit_title(report))}</strong></p>'
    return f'<div style="max-width:640px">{title}{bar}<ul style="margin:4px 0">{lines}</ul></div>'


def _fit_title(report: FitReport) -> str:
    if report.plan is None:
        return f"{report.model} does not fit"
    plan = report.plan
    of = f"{format_bytes(plan.predicted_peak_bytes)} of {format_bytes(plan.usable_bytes)} usable"
    return f"{report.model} fits: {of} on {plan.device.name}"


def _places(has_card: bool) -> Row:
    return ("card", "RAM") if has_card else ("RAM",)


def _figures(has_card: bool, card_bytes: int, ram_bytes: int) -> Row:
    shown = (card_bytes, ram_bytes) if has_card else (ram_bytes,)
    return tuple(format_bytes(n) if n >= _SHOWN_BYTES else "" for n in shown)


def _heads(has_card: bool) -> Row:
    return ("", *_places(has_card), "")


def _holder_rows(report: HoldersReport) -> list[Row]:
    rows = []
    for h in report.holders:
        whose = {"variable": f"del {h.name}", "pool": "", "rest": ""}.get(h.kind, FREES if h.kind in AUTOMATIC else "")
        words = "; ".join(filter(None, [whose, h.note]))
        rows.append((h.name, *_figures(report.has_card, h.card_bytes, h.ram_bytes), words))
    return rows


def _freed_title(report: FreedReport) -> str:
    where = "on the card" if report.has_card else "in RAM"
    if report.total_bytes < _SHOWN_BYTES:
        return f"freed  less than 1 MiB {where}: variables hold the rest, or libraries (--who)"
    return f"freed  {format_bytes(report.total_bytes)} {where}"


def _freed_rows(report: FreedReport) -> list[Row]:
    return [
        (f.what, *(figure or "-" for figure in _figures(report.has_card, f.card_bytes, f.ram_bytes)), _some(f.names))
        for f in report.freed
    ]


def _some(names: Sequence[str]) -> str:
    more = [f"{len(names) - _FEW} more"] if len(names) > _FEW else []
    return ", ".join([*names[:_FEW], *more])


def _aligned(rows: Sequence[Row]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *figures, last in rows:
        middle = "  ".join(f"{figure:>{width}}" for figure, width in zip(figures, widths[1:], strict=False))
        lines.append(f"  {first:<{widths[0]}}  {middle}  {last}".rstrip())
    return lines


def _table(heads: Row, rows: Sequence[Row]) -> str:
    head = "".join(f'<th scope="col" style="{_CELL}">{escape(h)}</th>' for h in heads)
    body = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(first)}</th>'
        + "".join(f'<td style="{_CELL}">{escape(cell)}</td>' for cell in cells)
        + "</tr>"
        for first, *cells in rows
    )
    return f'<table style="border-collapse:collapse;margin:4px 0;font-size:13px"><tr>{head}</tr>{body}</table>'
