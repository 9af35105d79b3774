"""A run's memory over time: the figures add up, no peak is lost, and everything is said in words too."""

from __future__ import annotations

import dataclasses
import re

from nbqlora.core.memory_profile import MemoryProfile, MemorySample, PhaseMemory
from nbqlora.core.specs import MemoryCategory as M
from nbqlora.core.units import GIB
from nbqlora.view.figures import timeline_figure
from nbqlora.view.timeline import columns, holders, stacked, timeline_html, timeline_svg, timeline_text
from tests.view.test_text import PLAN, REPORT


def sample(at: float, phase: str, peak: float) -> MemorySample:
    return MemorySample(elapsed_seconds=at, phase=phase, peak_bytes=int(peak * GIB), after_bytes=int(peak * GIB) // 2)


PROFILE = MemoryProfile(
    kind="cuda",
    phases=(
        PhaseMemory(phase="load", peak_bytes=6 * GIB, after_bytes=5 * GIB),
        PhaseMemory(phase="step", peak_bytes=13 * GIB, after_bytes=6 * GIB),
    ),
    by_category={M.ACTIVATIONS: 7 * GIB, M.OPTIMIZER: GIB, M.WEIGHTS: 5 * GIB},
    samples=(sample(10, "load", 6), sample(20, "step", 13), sample(30, "step", 12.5)),
)
MEASURED = dataclasses.replace(REPORT, memory=PROFILE)


def test_a_moment_s_holders_add_up_to_its_peak_from_the_foot() -> None:
    held = holders(PROFILE)
    assert [*held] == [M.WEIGHTS, M.OPTIMIZER, M.ACTIVATIONS]
    assert stacked(13 * GIB, held) == [(M.WEIGHTS, 5 * GIB), (M.OPTIMIZER, GIB), (M.ACTIVATIONS, 7 * GIB)]
    assert stacked(3 * GIB, held) == [(M.WEIGHTS, 3 * GIB)]
    assert stacked(0, held) == []


def test_a_long_run_keeps_its_peaks() -> None:
    many = [sample(i, "step", 5) for i in range(5000)]
    many[3333] = sample(3333, "step", 14)
    shown = columns(many)
    assert len(shown) <= 120 and many[3333] in shown
    assert columns(many[:50]) == many[:50]
    long = dataclasses.replace(PROFILE, samples=tuple(many))
    assert len(timeline_svg(long, PLAN)) < 80_000


def test_each_column_says_what_it_is() -> None:
    titles = re.findall(r"<g><title>(.*?)</title>", timeline_html(MEASURED))
    assert titles[1] == (
        "20 s, step: peak 13.0 GiB, afterwards 6.5 GiB; "
        "weights 5.0 GiB, optimizer 1.0 GiB, activations and the rest 7.0 GiB"
    )
    assert len(titles) == 3


def test_the_words_and_the_legend() -> None:
    assert timeline_text(MEASURED) == (
        "memory of run1: load 6.0 GiB at most, step 13.0 GiB at most; at the peak of training: "
        "weights 5.0 GiB, optimizer 1.0 GiB, activations and the rest 7.0 GiB"
    )
    html = timeline_html(MEASURED)
    for words in ("plan 12.4 GiB", "usable 13.8 GiB", "card 14.7 GiB", "weights", "activations and the rest", "load"):
        assert f"{words}</span>" in html, words
    assert '<th scope="row"' in html and "13.0 GiB</td>" in html, "figures that stay where pictures are taken out"
    assert timeline_text(REPORT) == "run1: nothing was measured"
    assert timeline_html(REPORT) == "<p>run1: nothing was measured</p>"


def test_the_figure_stacks_the_same_bars() -> None:
    axes = timeline_figure(MEASURED).axes[0]
    weights, optimizer, activations, _ = axes.containers
    assert [round(bar.get_height(), 2) for bar in weights] == [5, 5, 5]
    assert [round(bar.get_y() + bar.get_height(), 2) for bar in activations] == [6, 13, 12.5]
    assert [bar.get_width() for bar in optimizer] == [10, 10, 10]
