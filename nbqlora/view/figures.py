"""Figures with matplotlib, made without pyplot: nothing global is opened, and nothing has to be closed."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from itertools import pairwise
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

from nbqlora.core.events import OomEvent, PhaseEvent, SavedEvent, StepEvent
from nbqlora.core.report import Report
from nbqlora.core.specs import MemoryCategory
from nbqlora.core.units import gib
from nbqlora.view.levels import plan_levels
from nbqlora.view.palette import COLOURS
from nbqlora.view.run_charts import EVALUATION, PEAK, TRAINING
from nbqlora.view.timeline import PHASE_COLOURS, columns, holder_name, holders, stacked

# Lines of six colours, and what lies between them and white.
_COLOURS = 32
_MOST_SQUARES = 16
# Of a picture's width, one line of text that stands upright.
_LETTER_SHARE = 0.035
_DASHES = {"plan": "--", "usable": ":", "card": "-"}


class ShownFigure(Figure):
    """A figure that Jupyter shows as PNG without an inline backend, in few colours: a third of the bytes."""

    def _repr_png_(self) -> bytes:
        full, small = BytesIO(), BytesIO()
        self.savefig(full, format="png", dpi=110)
        # The other ways merge the colours of thin lines.
        Image.open(full).convert("RGB").quantize(_COLOURS, Image.Quantize.MAXCOVERAGE).save(
            small, format="png", optimize=True
        )
        return small.getvalue()


def run_figure(report: Report, memory: Sequence[tuple[float, float]] = ()) -> ShownFigure:
    """Loss over the steps with what was saved, and memory over time beside the plan's prediction and the limits.

    Args:
        memory: ``(seconds, bytes)`` in use, on the clock of the report's events; () where nobody watched.
    """
    figure = ShownFigure(figsize=(8, 3), layout="constrained")
    loss, held = figure.subplots(1, 2)
    _draw_loss(loss, report)
    _draw_memory(held, report, memory)
    loss.xaxis.get_major_locator().set_params(integer=True)
    for axes in (loss, held):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _draw_loss(axes: Any, report: Report) -> None:
    steps = report.steps
    axes.plot([e.step for e in steps], [e.loss for e in steps], marker=".", color=TRAINING, label="training")
    if report.evals:
        xs, ys = [e.step for e in report.evals], [e.loss for e in report.evals]
        every = -(-len(xs) // _MOST_SQUARES)
        axes.plot(xs, ys, "s--", color=EVALUATION, label="evaluation", markevery=every)
    saved = sorted({e.step for e in report.events if isinstance(e, SavedEvent)})
    if saved:
        top = axes.get_xaxis_transform()
        axes.plot(saved, [1.0] * len(saved), "v", color="#6F6F6F", transform=top, clip_on=False, label="saved")
    axes.set(title="Loss per learned token", xlabel="step", ylabel="loss")
    axes.legend(frameon=False)


def _draw_memory(axes: Any, report: Report, memory: Sequence[tuple[float, float]]) -> None:
    peaks = [(e.elapsed_seconds, e.peak_bytes) for e in report.events if isinstance(e, StepEvent)]
    axes.plot([x for x, _ in peaks], [gib(y) for _, y in peaks], "-.", color=PEAK, label="peak so far")
    if memory:
        axes.plot([x for x, _ in memory], [gib(y) for _, y in memory], color=TRAINING, label="in use")
    for word, n_bytes, _ in plan_levels(report.plan, report.measured_peak_bytes)[0]:
        axes.axhline(
            gib(n_bytes), linestyle=_DASHES[word], color="#7C4293" if word == "plan" else "#6F6F6F", label=word
        )
    top = 1.25 * max(axes.get_ylim())
    _mark_events(axes, report, min(x for x, _ in [*memory, *peaks]) if peaks else 0.0)
    axes.set(title="Memory", xlabel="seconds", ylabel="GiB", ylim=(0, top))
    axes.legend(frameon=False, loc="lower right")


def _mark_events(axes: Any, report: Report, begin: float) -> None:
    """Where phases began, by name, and where the card was full."""
    top = axes.get_xaxis_transform()
    phases = [e for e in report.events if isinstance(e, PhaseEvent) and e.elapsed_seconds >= begin]
    left, right = axes.get_xlim()
    for together in _in_groups(phases, _LETTER_SHARE * (right - left)):
        at, names = together[0].elapsed_seconds, " · ".join(dict.fromkeys(e.phase for e in together))
        axes.text(at, 1.0, f" {names}", transform=top, fontsize=8, rotation=90, va="top")
    for phase in phases:
        axes.axvline(phase.elapsed_seconds, color="#BDBDBD", linewidth=0.8)
    for event in report.events:
        if isinstance(event, OomEvent):
            axes.text(event.elapsed_seconds, 0.9, "full", transform=top, color="#D32224", weight="bold")


def _in_groups(phases: Sequence[PhaseEvent], width: float) -> list[list[PhaseEvent]]:
    """Phases, the names of which would lie over that of the first of their group."""
    groups: list[list[PhaseEvent]] = []
    for event in phases:
        if groups and event.elapsed_seconds - groups[-1][0].elapsed_seconds < width:
            groups[-1].append(event)
        else:
            groups.append([event])
    return groups


def timeline_figure(report: Report) -> ShownFigure:
    """Memory over time by holder, the phase of each moment below it; for a report that has measured memory."""
    profile = report.memory
    assert profile is not None
    figure = ShownFigure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots()
    shown, held = columns(profile.samples, 300), holders(profile)
    edges = [0.0, *(s.elapsed_seconds for s in shown)]
    drawn = [dict(stacked(s.peak_bytes, held)) for s in shown]
    foot = [0.0] * len(shown)
    widths = [b - a for a, b in pairwise(edges)]
    for category in dict.fromkeys([*held, MemoryCategory.ACTIVATIONS]):
        heights = [gib(parts.get(category, 0)) for parts in drawn]
        axes.bar(edges[:-1], heights, widths, foot, align="edge", color=COLOURS[category], label=holder_name(category))
        foot = [a + b for a, b in zip(foot, heights, strict=True)]
    for word, n_bytes, _ in plan_levels(report.plan, max(s.peak_bytes for s in shown))[0]:
        axes.axhline(gib(n_bytes), linestyle=_DASHES[word], color="#6F6F6F", label=word)
    strip = [PHASE_COLOURS.get(s.phase, "#BDBDBD") for s in shown]
    low = -0.05 * axes.get_ylim()[1]
    axes.bar(edges[:-1], [low] * len(shown), widths, align="edge", color=strip)
    phases = ", ".join(f"{p.phase} {gib(p.peak_bytes):.2f}" for p in profile.phases)
    axes.set(xlabel="seconds", ylabel="GiB")
    axes.set_title(f"Memory of {report.name}; peaks by phase: {phases}", fontsize=9)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
