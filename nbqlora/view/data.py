"""The data before training: what is learned, cut and left out, a histogram of lengths, and a few rows as they are.

What the loss counts reads without colour: in «» in text, underlined in HTML, where the tint is half transparent
and works on light and dark pages. A long row is shortened piece by piece, so that each turn stays visible.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from html import escape

from nbqlora.core import display
from nbqlora.core.data_report import PADDED_ROWS, DataReport, Preview, listed
from nbqlora.core.specs import BatchLayout, MemoryCategory
from nbqlora.core.units import format_count
from nbqlora.view.html import rows_html
from nbqlora.view.palette import COLOURS
from nbqlora.view.text import Row

_WIDTH = 118
_LABEL = 12
_BAR_CHARACTERS = 30
_BIN = "text-align:right;padding-right:8px;font-weight:normal"
# Of a preview; less where the whole would grow beyond the limit, for text full of signs that HTML spells out.
_PREVIEW_CHARACTERS = (600, 300, 150)
_MOST_BYTES = 15_000
_PIECE_CHARACTERS = 25  # one for each so many characters of a preview
_MOST_REASONS = 6
_SHORTENED = " […] "
_TINT = COLOURS[MemoryCategory.WEIGHTS]
# Some pages give <ins> a colour of their own, and take its line away.
_LEARNED = f"background:{_TINT}40;color:inherit;text-decoration:underline"


def register_data_views() -> None:
    """Let ``DataReport`` show itself through this module."""
    display.register(DataReport, text=data_text, html=data_html)


def data_title(report: DataReport) -> str:
    """``rows.jsonl: 9,812 of 10,000 rows, 1.5M tokens, 0.9M of them learned (60 %)``."""
    stats = report.stats
    learned = f"{format_count(stats.n_supervised_tokens)} of them learned"
    share = _percent(stats.n_supervised_tokens, stats.n_tokens)
    rows = f"{stats.n_rows:,} of {report.n_read:,} {report.unit}s"
    return f"{stats.source}: {rows}, {format_count(stats.n_tokens)} tokens, {learned} ({share})"


def data_rows(report: DataReport) -> list[Row]:
    """The report line by line."""
    stats = report.stats
    low, _, middle, _, high = stats.percentiles
    lengths = f"5 % have at most {low:,}, 95 % at most {high:,}, the longest has {stats.max_tokens:,}"
    rows: list[Row] = [("format", stats.format, "")] if stats.format else []
    rows.append(("length", f"{middle:,} tokens in the middle", lengths))
    rows.append(("cut", *_cut(report)))
    rows += _left_out(report)
    again = "the same tokens as an earlier one, and kept"
    where = listed(report.duplicate_rows, report.n_duplicates, report.unit) if report.n_duplicates else ""
    rows.append(("duplicates", _count(report.n_duplicates, report), f"{again} ({where})" if where else ""))
    rows.append(("layout", stats.layout.value, _layout(report)))
    return rows


def _cut(report: DataReport) -> tuple[str, str]:
    n_rows, stats = report.stats.n_truncated, report.stats
    limit = f"max_length = {report.max_length:,}"
    if not n_rows:
        return "no row", f"none is longer than {limit}"
    share = _percent(n_rows, stats.n_rows)
    lost = f"{format_count(report.n_cut_tokens)} tokens beyond {limit} are left away"
    return f"{_count(n_rows, report)} ({share})", f"{lost}, {format_count(report.n_cut_learned)} of them to be learned"


def _left_out(report: DataReport) -> list[Row]:
    """How many rows, and a line for each of the commonest reasons."""
    n_rows = sum(s.count for s in report.skipped)
    if not n_rows:
        return [("left out", "no row", "")]
    shown, others = report.skipped[:_MOST_REASONS], report.skipped[_MOST_REASONS:]
    rows = [("", _count(s.count, report), f"{s.reason} ({listed(s.rows, s.count, report.unit)})") for s in shown]
    if others:
        rows.append(("", _count(sum(s.count for s in others), report), f"{len(others)} other reasons"))
    return [("left out", f"{_count(n_rows, report)} ({_percent(n_rows, report.n_read)})", ""), *rows]


def _layout(report: DataReport) -> str:
    stats, filled = report.stats, f"{100 * report.fill:.0f} %"
    match stats.layout:
        case BatchLayout.PACKED:
            packs = f"{stats.n_sequences:,} pack{'s' if stats.n_sequences != 1 else ''} of {report.max_length:,} tokens"
            how = f"{packs}, filled to {filled}"
        case BatchLayout.JOINED:
            how = "rows are laid end to end, without padding"
        case BatchLayout.PADDED:
            how = f"of {PADDED_ROWS} rows filled up to the longest, {filled} are tokens and the rest is padding"
    return f"{how}; {stats.layout_because}" if stats.layout_because else how


def _count(n: int, report: DataReport) -> str:
    return f"{n:,} {report.unit}{'s' if n != 1 else ''}" if n else "none"


def _percent(part: int, whole: int) -> str:
    percent = 100 * part / max(1, whole)
    if 0 < percent < 0.1:
        return "under 0.1 %"
    return f"{percent:.0f} %" if percent >= 10 or percent == round(percent) else f"{percent:.1f} %"


def data_text(report: DataReport) -> str:
    """The report as aligned lines, the histogram in number signs, and the rows shown."""
    lines = [f"data  {data_title(report)}"]
    for label, value, remark in data_rows(report):
        joined = f"{value}: {remark}" if value and remark else value + remark
        lines += _wrapped(label, joined)
        if label == "length":
            lines += _bars(report)
    for preview in report.previews:
        lines += _wrapped(f"{report.unit} {preview.row:,}", f"{_which(preview)}; what is learned stands in «»")
        marked = "".join(f"«{text}»" if learned else text for text, learned in shortened(preview.pieces))
        for line in marked.splitlines():
            lines += textwrap.wrap(line, _WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6) or [""]
    return "\n".join(line.rstrip() for line in lines)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=f"  {label:<{_LABEL}} ", subsequent_indent=" " * (_LABEL + 3))


def _bars(report: DataReport) -> list[str]:
    most = max((n for _, _, n in report.histogram), default=1)
    lines = []
    for low, high, n in report.histogram:
        bar = "#" * max(round(_BAR_CHARACTERS * n / most), 1 if n else 0)
        lines.append(f"{_bin(low, high):>{_LABEL + 14}}  {bar:<{_BAR_CHARACTERS}} {n:>9,}{_beyond(high, report)}")
    return lines


def _bin(low: int, high: int) -> str:
    return f"{low:,} - {high:,}" if high > low else f"{low:,}"


def _beyond(high: int, report: DataReport) -> str:
    return f"  cut at {report.max_length:,}" if high > report.max_length else ""


def _which(preview: Preview) -> str:
    cut = f", {preview.n_cut_tokens:,} of them cut" if preview.n_cut_tokens else ""
    return f"{preview.why}, {preview.n_tokens:,} tokens{cut}"


def shortened(pieces: Sequence[tuple[str, bool]], room: int = _PREVIEW_CHARACTERS[0]) -> list[tuple[str, bool]]:
    """At most about ``room`` characters: the longest pieces lose their middle, and many pieces their end."""
    shown = list(pieces[: room // _PIECE_CHARACTERS])
    more = [(_SHORTENED, False)] if len(pieces) > len(shown) else []
    lengths = sorted(len(text) for text, _ in shown)
    for i, length in enumerate(lengths):
        each = room // (len(lengths) - i)
        if length > each:
            return [*((_without_middle(text, each), learned) for text, learned in shown), *more]
        room -= length
    return [*shown, *more]


def _without_middle(text: str, length: int) -> str:
    half = max(4, (length - len(_SHORTENED)) // 2)
    return text if len(text) <= max(length, 2 * half) else text[:half] + _SHORTENED + text[-half:]


def data_html(report: DataReport) -> str:
    """The same as tables, with the rows shown folded away; below 15 kB."""
    title = f'<p style="margin:4px 0"><strong>{escape(data_title(report))}</strong></p>'
    tables = f"{title}{rows_html(data_rows(report))}{_bars_html(report)}"
    for room in _PREVIEW_CHARACTERS:
        html = f'<div style="max-width:900px;font-size:13px">{tables}{_folded(report, room)}</div>'
        if len(html.encode()) < _MOST_BYTES:
            break
    return html


def _folded(report: DataReport, room: int) -> str:
    previews = "".join(_preview_html(preview, report.unit, room) for preview in report.previews)
    learned = f'<ins style="{_LEARNED}">what is learned</ins> underlined'
    summary = f"<summary>{len(report.previews)} of the {report.unit}s, {learned}</summary>"
    return f"<details>{summary}{previews}</details>" if previews else ""


def _bars_html(report: DataReport) -> str:
    most = max((n for _, _, n in report.histogram), default=1)
    cells = "".join(
        f'<tr><th scope="row" style="{_BIN}">{_bin(low, high)}</th><td style="width:300px">'
        f'<div style="width:{100 * n / most:.1f}%;height:11px;background:{_TINT}"></div></td>'
        f"<td>{n:,}{_beyond(high, report)}</td></tr>"
        for low, high, n in report.histogram
    )
    head = f'<tr><th scope="col">tokens</th><th></th><th scope="col">{report.unit}s</th></tr>'
    return f'<table style="border-collapse:collapse;margin:4px 0;font-size:12px">{head}{cells}</table>'


def _preview_html(preview: Preview, unit: str, room: int) -> str:
    text = "".join(
        f'<ins style="{_LEARNED}">{escape(piece, quote=False)}</ins>' if learned else escape(piece, quote=False)
        for piece, learned in shortened(preview.pieces, room)
    )
    style = "white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;margin:2px 0 8px"
    head = f'<p style="margin:6px 0 0">{unit} {preview.row:,}: {_which(preview)}</p>'
    return f'{head}<pre style="{style}">{text}</pre>'
