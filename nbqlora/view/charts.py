"""Small charts as inline SVG: what a live view can send again and again, and what a hover needs no script for.

A chart is one ``<svg role="img">`` that says in its label what it shows. Text takes the page's own colour, so it
reads on light and dark; lines differ in dash and in the word beside them, not in colour alone; a ``<title>`` inside
a mark is its tooltip. A curve of any length becomes at most ``MOST_POINTS`` points: of each stretch the lowest and
the highest, so that a spike is never averaged away. Such a curve takes about 0.8 kB.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

MOST_POINTS = 80
WIDTH, HEIGHT = 400, 150
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 16, 20


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points, in order: the first, the last, and the lowest and highest of each stretch between."""
    if len(points) <= most:
        return list(points)
    inner, n = points[1:-1], (most - 2) // 2
    kept = [points[0]]
    for i in range(n):
        stretch = range(i * len(inner) // n, (i + 1) * len(inner) // n)
        ends = {min(stretch, key=lambda j: inner[j][1]), max(stretch, key=lambda j: inner[j][1])}
        kept += [inner[j] for j in sorted(ends)]
    return [*kept, points[-1]]


@dataclass(frozen=True, kw_only=True)
class Axes:
    """A chart's ranges, in the units of what it shows, and where they lie in the picture."""

    x: tuple[float, float]
    y: tuple[float, float]

    def at(self, point: Point) -> Point:
        """A point in the picture's units."""
        return self.across(point[0]), self.up(point[1])

    def across(self, value: float) -> float:
        """From the left."""
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, *self.x)

    def up(self, value: float) -> float:
        """From the top."""
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, *self.y)


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 0.5


def svg(label: str, body: str) -> str:
    """A chart around its marks; ``label`` is what a screen reader says."""
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12" '
        f'style="width:100%;max-width:480px;display:block" fill="currentColor">{body}</svg>'
    )


def curve(axes: Axes, points: Sequence[Point], stroke: str, *, dash: str = "", width: float = 2) -> str:
    """A line through points; those that are not finite leave no gap."""
    finite = [p for p in points if math.isfinite(p[1])]
    placed = " ".join(f"{x:.0f},{y:.1f}" for x, y in map(axes.at, thinned(finite)))
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{placed}" fill="none" stroke="{stroke}" stroke-width="{width}"{dashed}/>'


def level(axes: Axes, value: float, title: str, dash: str) -> str:
    """A horizontal line with a tooltip."""
    return (
        f'<path d="M{LEFT} {axes.up(value):.1f}H{WIDTH - RIGHT}" stroke="currentColor" stroke-dasharray="{dash}" '
        f'opacity=".8"><title>{escape(title)}</title></path>'
    )


def marks(axes: Axes, sign: str, placed: Sequence[tuple[float, str]]) -> str:
    """Signs on thin upright lines, each with a tooltip; ``placed`` holds where each is, and what it says."""
    lines = "".join(f"M{axes.across(x):.0f} {TOP}v{HEIGHT - TOP - BOTTOM}" for x, _ in placed)
    signs = "".join(
        f'<text x="{axes.across(x):.0f}" y="{TOP - 4}"><title>{escape(title, quote=False)}</title>{sign}</text>'
        for x, title in placed
    )
    return f'<path d="{lines}" stroke="currentColor" stroke-dasharray="1 3"/><g text-anchor="middle">{signs}</g>'


def frame(axes: Axes, low: str, high: str, x_low: str, x_high: str) -> str:
    """The two axes, with a word at each end of each."""
    bottom = HEIGHT - BOTTOM
    ends = [(LEFT, "start", x_low), (WIDTH - RIGHT, "end", x_high)]
    under = "".join(
        f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{side}">{escape(word)}</text>' for x, side, word in ends
    )
    beside = "".join(
        f'<text x="{LEFT - 4}" y="{y}" text-anchor="end">{escape(word)}</text>'
        for y, word in ((TOP + 4, high), (bottom + 4, low))
    )
    line = f'<path d="M{LEFT} {TOP}V{bottom}H{WIDTH - RIGHT}" fill="none" stroke="currentColor" opacity=".5"/>'
    return line + under + beside


def key(stroke: str, word: str, dash: str = "") -> str:
    """A short piece of a line and its word, for a legend below the chart."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    piece = f'<path d="M0 5H20" stroke="{stroke}" stroke-width="3"{dashed}/>'
    return (
        '<span style="white-space:nowrap;margin-right:12px">'
        f'<svg aria-hidden="true" width="20" height="10">{piece}</svg> {escape(word)}</span>'
    )
