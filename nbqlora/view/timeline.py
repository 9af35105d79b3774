"""A run's memory over time: who held it, in which phase, beside the plan and the limit; as SVG with a hover.

Each moment is one column: at its foot the holders that were counted (weights, adapter, optimizer, ...), above them what
the moment's peak has more, activations and all else that nobody counted. Holders are counted once, at the peak of
training, so a column that is lower than their sum ends where it ends, in their order. A strip below the columns names
the phases. The hover is each column's ``<title>``: no script, and a screen reader finds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from nbqlora.core.memory_profile import MemoryProfile, MemorySample
from nbqlora.core.plan import Plan
from nbqlora.core.report import Report
from nbqlora.core.specs import MemoryCategory
from nbqlora.core.units import format_bytes, format_seconds, gib
from nbqlora.view.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes, key, level
from nbqlora.view.levels import plan_levels
from nbqlora.view.measured import measured_html
from nbqlora.view.palette import COLOURS

MOST_COLUMNS = 120
PHASE_COLOURS = {
    "load": "#6F6F6F", "probe": "#B39DDB", "forward": "#71D0F5", "backward": "#426EBD", "step": "#31865A",
    "optimizer": "#E4C22D", "eval": "#E296D0", "save": "#7C4293",
}  # fmt: skip
_STRIP = 7


def columns(samples: Sequence[MemorySample], most: int = MOST_COLUMNS) -> list[MemorySample]:
    """At most ``most`` samples: of each stretch the one with the highest peak, so that no peak is lost."""
    if len(samples) <= most:
        return list(samples)
    bounds = [i * len(samples) // most for i in range(most + 1)]
    return [max(samples[a:b], key=lambda s: s.peak_bytes) for a, b in pairwise(bounds)]


def stacked(peak_bytes: int, held: dict[MemoryCategory, int]) -> list[tuple[MemoryCategory, int]]:
    """A moment's peak by holder, from the foot up; sums to ``peak_bytes``."""
    parts, left = [], peak_bytes
    for category, n_bytes in held.items():
        if category is not MemoryCategory.ACTIVATIONS and n_bytes:
            parts.append((category, min(n_bytes, left)))
            left -= parts[-1][1]
    return [*((c, n) for c, n in parts if n), *([(MemoryCategory.ACTIVATIONS, left)] if left else [])]


def holders(profile: MemoryProfile) -> dict[MemoryCategory, int]:
    """Counted holders in the order in which they stand: what lasts longest at the foot."""
    m = MemoryCategory
    order = [m.CONTEXT, m.WEIGHTS, m.ADAPTER, m.OPTIMIZER, m.GRADIENTS, m.DEQUANT, *m]
    return {c: profile.by_category[c] for c in dict.fromkeys(order) if profile.by_category.get(c)}


def timeline_svg(profile: MemoryProfile, plan: Plan) -> str:
    """The picture; "" where nothing was measured."""
    shown, held = columns(profile.samples), holders(profile)
    if not shown:
        return ""
    highest = max(s.peak_bytes for s in shown)
    levels, _ = plan_levels(plan, highest)
    top = 1.08 * max([highest, *(n for _, n, _ in levels)])
    axes = Axes(x=(0.0, shown[-1].elapsed_seconds), y=(0.0, top))
    edges = [0.0, *(s.elapsed_seconds for s in shown)]
    body = "".join(_column(axes, begin, sample, held) for begin, sample in zip(edges, shown, strict=False))
    body += "".join(level(axes, n, f"{word} {format_bytes(n)}", dash) for word, n, dash in levels)
    label = f"memory over {format_seconds(axes.x[1])}, {format_bytes(highest)} at most; {_phases(profile)}"
    return (
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="9" '
        'style="width:100%;max-width:600px;display:block" fill="currentColor" shape-rendering="crispEdges">'
        f"{_frame(axes)}{body}</svg>"
    )


def _frame(axes: Axes) -> str:
    bottom = HEIGHT - BOTTOM
    words = [(LEFT - 4, TOP + 4, f"{gib(axes.y[1]):.1f} GiB"), (LEFT - 4, bottom, "0")]
    beside = "".join(f'<text x="{x}" y="{y}" text-anchor="end">{word}</text>' for x, y, word in words)
    end = format_seconds(axes.x[1])
    return (
        f'{beside}<text x="{LEFT}" y="{HEIGHT - 2}">0 s</text>'
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{end}</text>'
    )


def _column(axes: Axes, begin: float, sample: MemorySample, held: dict[MemoryCategory, int]) -> str:
    left, right = axes.across(begin), axes.across(sample.elapsed_seconds)
    width = max(0.6, right - left)
    parts, at, words = "", 0, []
    for category, n_bytes in stacked(sample.peak_bytes, held):
        y, foot = axes.up(at + n_bytes), axes.up(at)
        parts += (
            f'<rect x="{left:.1f}" y="{y:.1f}" width="{width:.1f}" height="{max(0.2, foot - y):.1f}" '
            f'fill="{COLOURS[category]}"/>'
        )
        at += n_bytes
        words.append(f"{holder_name(category)} {format_bytes(n_bytes)}")
    title = (
        f"{format_seconds(sample.elapsed_seconds)}, {sample.phase}: peak {format_bytes(sample.peak_bytes)}, "
        f"afterwards {format_bytes(sample.after_bytes)}; {', '.join(words)}"
    )
    strip = (
        f'<rect x="{left:.1f}" y="{HEIGHT - BOTTOM + 1}" width="{width:.1f}" height="{_STRIP}" '
        f'fill="{PHASE_COLOURS.get(sample.phase, "#BDBDBD")}"/>'
    )
    return f"<g><title>{escape(title)}</title>{parts}{strip}</g>"


def holder_name(category: MemoryCategory) -> str:
    """The word for a holder here: nobody counts activations, they are what is left."""
    return "activations and the rest" if category is MemoryCategory.ACTIVATIONS else category.label


def timeline_html(report: Report) -> str:
    """Picture, legend, and the figures as tables, which are what is left where pictures are taken out."""
    profile = report.memory
    if profile is None or not profile.samples:
        return f"<p>{escape(timeline_text(report))}</p>"
    highest = max(s.peak_bytes for s in profile.samples)
    near, far = plan_levels(report.plan, highest)
    shown = [*holders(profile), MemoryCategory.ACTIVATIONS]
    legend = "".join(key(COLOURS[c], holder_name(c)) for c in dict.fromkeys(shown))
    legend += "".join(key("currentColor", f"{word} {format_bytes(n)}", dash) for word, n, dash in near)
    strip = "".join(key(PHASE_COLOURS.get(p.phase, "#BDBDBD"), p.phase) for p in profile.phases)
    above = f"<div>{escape('; '.join(far))}, above this picture</div>" if far else ""
    return (
        f'<figure style="margin:4px 0;font-size:13px"><figcaption>Memory of {escape(report.name)} over time, by '
        f"holder; the strip names the phase</figcaption>{timeline_svg(profile, report.plan)}"
        f"<div>{legend}</div><div>phases: {strip}</div>{above}</figure>{measured_html(profile, report.plan.budget)}"
    )


def timeline_text(report: Report) -> str:
    """The same in words."""
    profile = report.memory
    if profile is None or not profile.phases:
        return f"{report.name}: nothing was measured"
    held = ", ".join(f"{holder_name(c)} {format_bytes(n)}" for c, n in holders(profile).items())
    return f"memory of {report.name}: {_phases(profile)}; at the peak of training: {held or 'not counted'}"


def _phases(profile: MemoryProfile) -> str:
    return ", ".join(f"{p.phase} {format_bytes(p.peak_bytes)} at most" for p in profile.phases)
