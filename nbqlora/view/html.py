"""The same rows as HTML: tables that still read where styles are stripped, and a stacked bar for memory."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from nbqlora.core.plan import Plan
from nbqlora.core.report import Comparison, Report
from nbqlora.core.units import format_bytes
from nbqlora.view import text
from nbqlora.view.measured import LABELS, measured_html
from nbqlora.view.memory import bar_html

_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"
_ANSWER = f"{_CELL};max-width:320px;overflow-wrap:anywhere"


def plan_html(plan: Plan) -> str:
    """Title, memory bar, and the plan's rows."""
    parts = [(c.label, n) for c, n in sorted(plan.budget.by_category.items(), key=lambda item: -item[1])]
    bar = bar_html(parts, plan.usable_bytes)
    rows = [r for r in text.plan_rows(plan) if r[0] != "peak"]
    words = f"peak {format_bytes(plan.predicted_peak_bytes)} predicted, of {format_bytes(plan.usable_bytes)} usable"
    peak = f'<p style="margin:4px 0">{words}</p>{bar}'
    return block(text.plan_title(plan), peak + rows_html(rows))


def report_html(report: Report) -> str:
    """Title and rows, and tables of its memory."""
    rows = [r for r in text.report_rows(report) if r[0] not in LABELS]
    memory = "" if report.memory is None else measured_html(report.memory, report.plan.budget)
    return block(text.report_title(report), rows_html(rows) + memory)


def rows_html(rows: Iterable[text.Row]) -> str:
    """A table of label, value and remark."""
    cells = "".join(
        f'<tr><th scope="row" style="{_CELL}">{escape(label)}</th>'
        f'<td style="{_CELL}">{escape(value)}</td><td style="{_CELL};opacity:.8">{escape(remark)}</td></tr>'
        for label, value, remark in rows
    )
    return f'<table style="border-collapse:collapse;margin:4px 0;font-size:13px">{cells}</table>'


def comparison_html(comparison: Comparison) -> str:
    """One row a prompt, base and tuned side by side."""
    head = "".join(f'<th scope="col" style="{_CELL}">{h}</th>' for h in ("prompt", "base", "tuned"))
    rows = "".join(
        "<tr>" + "".join(f'<td style="{_ANSWER}">{_lines(cell)}</td>' for cell in row) + "</tr>"
        for row in comparison.rows
    )
    return f'<table style="border-collapse:collapse;font-size:13px"><tr>{head}</tr>{rows}</table>'


def _lines(answer: str) -> str:
    return "<br>".join(escape(line) for line in answer.splitlines()) or "<em>(nothing)</em>"


def block(title: str, body: str) -> str:
    """A title above a body, no wider than a page."""
    return f'<div style="max-width:900px"><p style="margin:4px 0"><strong>{escape(title)}</strong></p>{body}</div>'
