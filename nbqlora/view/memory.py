"""Memory for people: one line of text, and a bar with its figures as a list; with several cards a line for each below.

The line's order is fixed: what is used of how much, who holds it (in the order of the categories, nothing
under 0.05 GiB), the peak, RAM, disk; all in GiB. What is given back on demand says so, and is hatched. The bar is
inline-styled HTML. Where styles are stripped (GitHub) its boxes vanish and the list of figures is left, as plain
bullets. Colours are those of the page or half transparent, so that it reads on light and dark.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from html import escape

from nbqlora.core import display
from nbqlora.core.report import CardNow, VramReport
from nbqlora.core.specs import MemoryCategory
from nbqlora.core.units import GIB, format_bytes, gib
from nbqlora.view.palette import COLOURS, RECLAIMABLE, category_of

_LINE = "var(--jp-border-color1,rgba(128,128,128,.6))"
_TRACK = "rgba(128,128,128,.15)"
_FREE = f"background:{_TRACK}"
_LIMIT = "height:100%;background:currentColor"
_UNNAMED_COLOUR = "#8C7F70"
_SHOWN_BYTES = 0.05 * GIB  # less would read 0.0


def register_memory_views() -> None:
    """Let ``VramReport`` show itself through this module."""
    display.register(VramReport, text=vram_text, html=vram_html)


def vram_text(report: VramReport) -> str:
    """``vram  Tesla T4  6.1 of 14.7 GiB used · this process 5.2 · … · RAM 8.1 of 12.7 free · disk 41 free``."""
    used = f"{gib(report.used_bytes):.1f} of {gib(report.total_bytes):.1f} GiB used"
    held = [(c, n) for c, n in _held(report.by_category) if n >= _SHOWN_BYTES]
    holders = [f"{c.label} {gib(n):.1f}{' (reclaimable)' if c in report.reclaimable else ''}" for c, n in held]
    head = f"{'ram' if report.kind == 'cpu' else 'vram':<4}  {_one_line(report.name)}  {used}"
    return "\n".join([" · ".join([head, *holders, *_surroundings(report)]), *_card_lines(report.cards)])


def _card_lines(cards: Sequence[CardNow]) -> list[str]:
    """``  card 1  Tesla T4  11.6 of 14.7 GiB used · workers of a run 11.3 · others 0.3``."""
    lines = []
    for number, card in enumerate(cards):
        own, workers = card.own_bytes or 0, card.workers_bytes or 0
        known = card.own_bytes is not None or card.workers_bytes is not None
        held = [("this process", own), ("workers of a run", workers)]
        held += [("others", max(0, card.used_bytes - own - workers))] if known else []
        used = f"{gib(card.used_bytes):.1f} of {gib(card.total_bytes):.1f} GiB used"
        words = [f"{name} {gib(n):.1f}" for name, n in held if n >= _SHOWN_BYTES]
        lines.append(" · ".join([f"  card {number}  {_one_line(card.name)}  {used}", *words]))
    return lines


def vram_html(report: VramReport) -> str:
    """The same with a bar, and the report's notes; at most 7 kB."""
    used = f"{gib(report.used_bytes):.1f} of {gib(report.total_bytes):.1f} GiB used"
    head = " · ".join([f"<strong>{escape(_one_line(report.name))}</strong> {used}", *_surroundings(report)])
    parts = [(category.label, n_bytes) for category, n_bytes in _held(report.by_category)]
    bar = bar_html(parts, report.total_bytes, reclaimable=report.reclaimable)
    lines = [*map(str.strip, _card_lines(report.cards)), *report.notes]
    below = "".join(f'<p style="margin:2px 0;opacity:.8">{escape(line)}</p>' for line in lines)
    return f'<div style="max-width:640px"><div>{head}</div>{bar}{below}</div>'


def meter_html(report: VramReport) -> str:
    """The text line above a bar without figures, for what is sent again and again: at most 2 kB."""
    parts = [(category.label, n_bytes) for category, n_bytes in _held(report.by_category)]
    bar = bar_html(parts, report.total_bytes, reclaimable=report.reclaimable, figures=False)
    text = escape(vram_text(report)).replace("\n", "<br>")
    return f'<div style="max-width:640px"><div>{text}</div>{bar}</div>'


def bar_html(
    parts: Sequence[tuple[str, int]],
    total_bytes: int,
    *,
    reclaimable: Collection[MemoryCategory] = (),
    figures: bool = True,
) -> str:
    """One stacked bar and the list of its figures.

    Args:
        parts: label and bytes, left to right; a :class:`MemoryCategory` label gets that category's colour.
        total_bytes: the whole bar. What the parts leave is shown as free; when they are more, the bar is as
            long as they are, a line stands where it should end, and the list says by how much they are over.
        reclaimable: categories that are given back on demand, beside those that always are.
        figures: the list, which is what is left where styles are stripped.
    """
    parts = [(label, n) for label, n in parts if n > 0]
    left = total_bytes - sum(n for _, n in parts)
    length = max(1, total_bytes, total_bytes - left)
    last, last_fill = (("free", left), _FREE) if left >= 0 else (("over by", -left), _LIMIT)
    given_back = RECLAIMABLE | set(reclaimable)
    words = [
        f"{label} {format_bytes(n)}{', reclaimable' if category_of(label) in given_back else ''}"
        for label, n in [*parts, last]
    ]
    boxes = "".join(_box(100 * n / length, _fill(label, given_back)) for label, n in parts)
    if left < 0:
        boxes += f'<div style="position:absolute;left:{100 * total_bytes / length:.2f}%;width:3px;{_LIMIT}"></div>'
    swatches = [*(_fill(label, given_back) for label, _ in parts), last_fill]
    items = "".join(_item(figure, fill) for figure, fill in zip(words, swatches, strict=True))
    aria = escape(f"{', '.join(words)}; {format_bytes(total_bytes)} in all")
    listed = f'<ul style="display:flex;flex-wrap:wrap;gap:0 14px;margin:0;padding:0;list-style:none">{items}</ul>'
    return (
        f'<div role="img" aria-label="{aria}" style="position:relative;display:flex;height:18px;'
        f'margin:4px 0;overflow:hidden;border:1px solid {_LINE};border-radius:3px;{_FREE}">{boxes}</div>'
        f"{listed if figures else ''}"
    )


def _box(percent: float, fill: str) -> str:
    return f'<div style="width:{percent:.2f}%;min-width:1px;border-right:1px solid {_TRACK};{fill}"></div>'


def _item(figure: str, fill: str) -> str:
    swatch = f'<span style="{fill};width:10px;height:10px;border:1px solid {_LINE}"></span>'
    return f'<li style="display:flex;align-items:center;gap:5px;margin:0">{swatch}{escape(figure)}</li>'


def _fill(label: str, reclaimable: Collection[MemoryCategory | None]) -> str:
    category = category_of(label)
    colour = COLOURS[category] if category else _UNNAMED_COLOUR
    if category not in reclaimable:
        return f"background:{colour}"
    return f"background:repeating-linear-gradient(45deg,{colour} 0 3px,{colour}40 3px 6px)"


def _held(by_category: Mapping[MemoryCategory, int]) -> list[tuple[MemoryCategory, int]]:
    return [(category, by_category.get(category, 0)) for category in MemoryCategory]


def _surroundings(report: VramReport) -> list[str]:
    peak = [f"peak {gib(report.peak_bytes):.1f}"] if report.peak_bytes >= _SHOWN_BYTES else []
    ram = f"RAM {gib(report.host_free_bytes):.1f} of {gib(report.host_total_bytes):.1f} free"
    disk = gib(report.disk_free_bytes)
    return [*peak, *([ram] if report.kind == "cuda" else []), f"disk {disk:.{0 if disk >= 10 else 1}f} free"]


def _one_line(text: str) -> str:
    return " ".join(text.split())
