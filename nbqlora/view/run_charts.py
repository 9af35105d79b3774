"""The two charts of a run: loss by step, and memory by time beside what was planned and what there is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from nbqlora.core.events import EvalEvent, OomEvent, SavedEvent, StepEvent
from nbqlora.core.plan import Plan
from nbqlora.core.units import format_bytes, format_seconds, gib
from nbqlora.view.charts import BOTTOM, HEIGHT, LEFT, TOP, Axes, Point, curve, frame, key, level, marks, svg, thinned
from nbqlora.view.levels import plan_levels

# title, label for those who do not see it, picture, legend
Chart = tuple[str, str, str, str]

TRAINING, EVALUATION, PEAK = "#426EBD", "#D0702B", "#2F9A68"
_MOST_MARKS = 12


def loss_chart(steps: Sequence[StepEvent], evals: Sequence[EvalEvent], saves: Sequence[SavedEvent]) -> Chart | None:
    """Training and evaluation loss, saves marked; None before there are two points."""
    points = [(float(e.step), e.loss) for e in steps if math.isfinite(e.loss)]
    held_out = [(float(e.step), e.loss) for e in evals if math.isfinite(e.loss)]
    if len(points) < 2:
        return None
    values = [y for _, y in [*points, *held_out]]
    low, high = min(values), max(values)
    room = 0.05 * (high - low) or 0.5
    axes = Axes(x=(min(points[0][0], *(x for x, _ in held_out or points)), points[-1][0]), y=(low - room, high + room))
    body = frame(axes, f"{low:.2f}", f"{high:.2f}", f"step {axes.x[0]:.0f}", f"{points[-1][0]:.0f}")
    saved = sorted({e.step for e in saves})[-_MOST_MARKS:]
    body += marks(axes, "▼", [(float(step), f"saved after step {step}") for step in saved]) if saved else ""
    body += curve(axes, points, TRAINING)
    body += curve(axes, held_out, EVALUATION, dash="5 3") + _squares(axes, held_out) if held_out else ""
    label = f"loss from {points[0][1]:.3f} to {points[-1][1]:.3f} over {len(points)} steps"
    legend = key(TRAINING, "training")
    if held_out:
        label += f"; on the eval rows from {held_out[0][1]:.3f} to {held_out[-1][1]:.3f}"
        legend += key(EVALUATION, "evaluation ■", "5 3")
    legend += "▼ saved" if saves else ""
    return "Loss per learned token", label, svg(label, body), legend


def _squares(axes: Axes, points: Sequence[Point]) -> str:
    placed = [axes.at(p) for p in thinned(points, 16)]
    path = "".join(f"M{x - 3:.0f} {y - 3:.0f}h6v6h-6z" for x, y in placed)
    return f'<path d="{path}" fill="{EVALUATION}"/>'


def memory_chart(
    now: Sequence[Point],
    peaks: Sequence[Point],
    phases: Sequence[tuple[float, str]],
    ooms: Sequence[tuple[float, OomEvent]],
    plan: Plan | None,
    end: float,
) -> Chart | None:
    """Memory in use and its peak over time, phases as bands; None before anything was measured.

    Args:
        now: ``(seconds, bytes)`` in use.
        peaks: the highest so far, at each step.
        phases: when each began.
        end: seconds, the right edge.
    """
    measured = [*now, *peaks]
    if not measured or plan is None:
        return None
    highest = max(y for _, y in measured)
    levels, far = plan_levels(plan, highest)
    top = 1.12 * max([highest, *(n for _, n, _ in levels)])
    axes = Axes(x=(min(x for x, _ in measured), max(end, *(x for x, _ in measured))), y=(0.0, top))
    body = _bands(axes, phases)
    body += frame(axes, "0", f"{gib(top):.1f}", format_seconds(axes.x[0]), format_seconds(axes.x[1]))
    body += "".join(level(axes, n, f"{word} {format_bytes(n)}", dash) for word, n, dash in levels)
    body += curve(axes, now, TRAINING) if len(now) > 1 else ""
    body += curve(axes, peaks, PEAK, dash="6 2 1 2") if len(peaks) > 1 else ""
    full = [(at, f"out of memory: {e.action[:60]}") for at, e in ooms[-_MOST_MARKS // 2 :]]
    body += marks(axes, "⚠", full) if full else ""
    label = _said(now, highest, plan)
    legend = (key(TRAINING, "in use") if len(now) > 1 else "") + key(PEAK, "peak so far", "6 2 1 2")
    legend += "".join(key("currentColor", f"{word} {format_bytes(n)}", dash) for word, n, dash in levels)
    legend += f"{'; '.join(far)}, above this chart" if far else ""
    return f"Memory of {plan.device.name}, GiB", label, svg(label, body), legend


def _said(now: Sequence[Point], highest: float, plan: Plan) -> str:
    held = f"memory {format_bytes(now[-1][1])} now, " if now else "memory "
    planned = f"the plan said {format_bytes(plan.predicted_peak_bytes)} of {format_bytes(plan.usable_bytes)} usable"
    return f"{held}{format_bytes(highest)} at most; {planned}"


def _bands(axes: Axes, phases: Sequence[tuple[float, str]]) -> str:
    """Each phase as a band with its name, where there is room for it."""
    ends = [at for at, _ in phases[1:]] + [axes.x[1]]
    bands, shown = "", [(a, b, p) for (a, p), b in zip(phases, ends, strict=True) if b > axes.x[0]][-_MOST_MARKS:]
    for i, (begin, stop, phase) in enumerate(shown):
        left, right = axes.across(begin), axes.across(stop)
        name = f'<text x="{left + 3:.0f}" y="{HEIGHT - BOTTOM - 4}" font-size="11">{phase}</text>'
        bands += (
            f'<g><title>{phase}, {format_seconds(stop - begin)}</title><rect x="{max(LEFT, left):.0f}" y="{TOP}" '
            f'width="{right - max(LEFT, left):.0f}" height="{HEIGHT - TOP - BOTTOM}" '
            f'opacity="{0.04 if i % 2 else 0.1}"/>{name if right - left > 7 * len(phase) + 6 else ""}</g>'
        )
    return bands
