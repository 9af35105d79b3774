"""A doctor's report: one line a check, its word first, what to do below it.

The words carry the meaning, so it reads the same in a shell, on a dark page and where styles are stripped.
"""

from __future__ import annotations

import textwrap
from html import escape

from nbqlora.core import display
from nbqlora.core.doctor import Check, DoctorReport

WIDTH = 118
_CELL = "text-align:left;vertical-align:top;padding:2px 12px 2px 0"


def register_doctor_view() -> None:
    """Let ``DoctorReport`` show itself through this module."""
    display.register(DoctorReport, text=doctor_text, html=doctor_html)


def doctor_text(report: DoctorReport) -> str:
    """The verdict, then aligned lines."""
    label = max((len(c.name) for c in report.checks), default=0)
    return "\n".join([f"nbqlora doctor: {report.verdict}", *(_lines(c, label) for c in report.checks)])


def _lines(check: Check, label: int) -> str:
    head = f"  {check.name:<{label}}  {check.status:<7}  "
    indent = " " * len(head)
    lines = textwrap.wrap(check.found, WIDTH - len(head), break_long_words=False, break_on_hyphens=False)
    if check.advice:
        room = WIDTH - len(head) - 3
        first, *rest = textwrap.wrap(check.advice, room, break_long_words=False, break_on_hyphens=False)
        lines += [f"-> {first}", *(f"   {line}" for line in rest)]
    return (head + f"\n{indent}".join(lines)).rstrip()


def doctor_html(report: DoctorReport) -> str:
    """The same as a table; what is not well is bold."""
    rows = "".join(_row(c) for c in report.checks)
    head = "".join(
        f'<th scope="col" style="{_CELL}">{title}</th>' for title in ("check", "result", "found, and what to do")
    )
    title = f'<p style="margin:4px 0"><strong>nbqlora doctor: {escape(report.verdict)}</strong></p>'
    table = f'<table style="border-collapse:collapse;margin:4px 0;font-size:13px"><tr>{head}</tr>{rows}</table>'
    return f'<div style="max-width:900px">{title}{table}</div>'


def _row(check: Check) -> str:
    is_well = check.status in ("ok", "skipped")
    status = check.status if is_well else f"<strong>{check.status}</strong>"
    advice = f"<br>&rarr; {escape(check.advice)}" if check.advice else ""
    return (
        f'<tr><th scope="row" style="{_CELL}">{escape(check.name)}</th><td style="{_CELL}">{status}</td>'
        f'<td style="{_CELL}">{escape(check.found)}{advice}</td></tr>'
    )
