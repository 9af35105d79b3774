"""A run in progress as a line and a block of charts: what they say, and what they weigh whatever the run."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from nbqlora.core.events import EvalEvent, NoteEvent, OomEvent, PhaseEvent, PlannedEvent, SavedEvent, StepEvent
from nbqlora.core.units import GIB
from nbqlora.view.charts import MOST_POINTS, thinned
from nbqlora.view.progress import Progress
from tests.view.test_memory_view import lightness_and_hue
from tests.view.test_text import PLAN


def step(number: int, total: int, *, loss: float = 1.0, seconds: float = 3.0, peak: float = GIB) -> StepEvent:
    return StepEvent(
        step=number, total_steps=total, loss=loss, learning_rate=1e-3, grad_norm=1.0, n_tokens=600, seconds=seconds,
        peak_bytes=int(peak), elapsed_seconds=1.0,
    )  # fmt: skip


def begun(name: str = "run1", total: int = 10) -> Progress:
    progress = Progress(name)
    progress.take(PhaseEvent(phase="look", elapsed_seconds=0.0), 0.0)
    progress.take(PlannedEvent(plan=PLAN, elapsed_seconds=0.0), 1.0)
    progress.take(PhaseEvent(phase="load", detail="some/llama-8b in NF4", elapsed_seconds=0.0), 1.0)
    progress.take(PhaseEvent(phase="train", detail=f"{total} steps", elapsed_seconds=0.0), 4.0)
    return progress


def long_run() -> Progress:
    """All there can be: twenty thousand steps of memory and loss, evaluations, saves, a card that was full, notes."""
    progress = begun("a_name_that_is_longer_than_a_line_should_have_to_carry", 100_000)
    for n in range(1, 20_001):
        at = 4.0 + 40.0 * n
        progress.sample(at - 20, int((8 + n % 7) * GIB))
        progress.take(step(n, 100_000, loss=12345.678 / n, seconds=40.0, peak=(9 + n / 4000) * GIB), at)
        if n % 50 == 0:
            progress.take(EvalEvent(step=n, loss=9.999, elapsed_seconds=at), at)
            path = f"/content/drive/MyDrive/{'folder/' * 40}step-{n}"
            progress.take(SavedEvent(step=n, path=path, n_bytes=1 << 28, elapsed_seconds=at), at)
            full = OomEvent(step=n, phase="backward", asked_bytes=3 << 30, action="<&\"'" * 200, elapsed_seconds=at)
            progress.take(full, at)
    progress.take(NoteEvent(text="<é&\"'>" * 500, elapsed_seconds=at), at)
    progress.fill = 0.973
    return progress


def test_the_line_says_where_it_is_and_when_it_ends() -> None:
    progress = begun()
    for n in (1, 2, 3):
        progress.take(step(n, 10, loss=4.0 / n, seconds=30.0 if n == 1 else 3.0), 30.0 + 3 * n)
    progress.take(EvalEvent(step=3, loss=1.5, elapsed_seconds=2.0), 40.0)
    assert progress.share == pytest.approx(0.3)
    assert progress.eta_seconds == pytest.approx(20.0)  # 7 steps of 3 s, one second of which is over
    assert progress.text() == (
        "run1: training · step 3/10 · loss 1.333 · eval 1.500 · under 1 min left · 200 tokens/s · peak 1.0 GiB · 40 s"
    )
    assert progress.html() == f"<progress value=3 max=10></progress> {progress.text()}"


def test_before_the_first_step_the_line_has_the_last_note() -> None:
    progress = Progress("run1")
    progress.take(PhaseEvent(phase="load", detail="demo in NF4", elapsed_seconds=0.0), 2.0)
    progress.take(NoteEvent(text="<b>careful</b>", elapsed_seconds=2.0), 3.0)
    assert progress.text() == "run1: loading demo in NF4 · <b>careful</b> · 3 s"
    assert "&lt;b&gt;careful" in progress.html() and "<b>" not in progress.html()


def test_the_block_shows_everything_and_says_it_in_words() -> None:
    progress = begun()
    for n in (1, 2, 3, 4):
        progress.sample(4.0 + 3 * n, int(n * GIB))
        progress.take(step(n, 10, loss=4.0 / n, peak=(8 + n) * GIB), 5.0 + 3 * n)
    progress.take(EvalEvent(step=4, loss=1.5, elapsed_seconds=2.0), 20.0)
    progress.take(SavedEvent(step=4, path="runs/run1/adapter", n_bytes=1 << 20, elapsed_seconds=0.0), 21.0)
    full = OomEvent(step=5, phase="backward", asked_bytes=GIB, action="the loss takes 64 tokens", elapsed_seconds=0.0)
    progress.take(full, 22.0)
    progress.fill = 0.973
    assert progress.charts_text().splitlines() == [
        "  loss from 4.000 to 1.000 over 4 steps; on the eval rows from 1.500 to 1.500",
        "  memory 4.0 GiB now, 12.0 GiB at most; the plan said 12.4 GiB of 13.8 GiB usable",
        "  padding: 97.3 % of the positions are tokens of rows",
        "  ▼ saved after step 4; last runs/run1/adapter",
        "  ⚠ out of memory in step 5, backward, asking for 1.0 GiB: the loss takes 64 tokens",
        "  ■ stops after this step and saves; a second ■ drops the step",
    ]
    html = progress.charts_html()
    for line in progress.charts_text().splitlines():
        assert line.strip() in html, line
    drawn = ["plan 12.4 GiB", "usable 13.8 GiB", "card 14.7 GiB", "in use", "peak so far", "training", "evaluation"]
    for words in [*drawn, ">saved after step 4<", ">out of memory: the loss takes 64 tokens<", ">train, "]:
        assert words in html, words
    assert html.count('role="img"') == 2
    assert not re.search(r'(?:[^-]color:|fill="(?:#0|#f|black|white))', html), "text takes the page's colour"


def test_a_limit_far_above_is_said_and_not_drawn() -> None:
    progress = begun()
    progress.plan = dataclasses.replace(PLAN, usable_bytes=500 * GIB)
    progress.sample(5.0, GIB)
    progress.sample(6.0, GIB)
    html = progress.charts_html()
    assert "usable 500 GiB, above this chart" in html
    assert html.count("<title>") == 2 + 1  # plan and card; one phase


def test_the_longest_run_is_as_light_as_a_short_one() -> None:
    progress = long_run()
    bundle = {"text/plain": progress.text(), "text/html": progress.html()}
    content = {"data": bundle, "metadata": {}, "transient": {"display_id": "nbq4194304-123"}}
    assert len(json.dumps(content, ensure_ascii=False).encode()) <= 400
    assert "step 20000/100000" in progress.text() and "left" in progress.text()
    block = {"text/plain": progress.charts_text(), "text/html": progress.charts_html()}
    assert len(json.dumps({**content, "data": block}, ensure_ascii=False).encode()) <= 12_000


def test_a_line_of_the_longest_words_fits_too() -> None:
    progress = Progress("n" * 300)
    progress.take(PhaseEvent(phase="load", detail='é"<&' * 200, elapsed_seconds=0.0), 2.0)
    progress.take(NoteEvent(text='é"<&' * 200, elapsed_seconds=0.0), 2.0)
    bundle = {"text/plain": progress.text(), "text/html": progress.html()}
    content = {"data": bundle, "metadata": {}, "transient": {"display_id": "nbq4194304-123"}}
    assert len(json.dumps(content, ensure_ascii=False).encode()) <= 400


def test_thinning_keeps_ends_and_spikes() -> None:
    points = [(float(i), 1.0) for i in range(10_000)]
    points[4321], points[777] = (4321.0, 9.0), (777.0, -9.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert (4321.0, 9.0) in kept and (777.0, -9.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:50]) == points[:50]


def test_losses_that_are_not_finite_do_not_break_the_chart() -> None:
    progress = begun()
    for n, loss in enumerate([1.0, float("nan"), float("inf"), 2.0], start=1):
        progress.take(step(n, 10, loss=loss), 5.0 + n)
    html = progress.charts_html()
    assert "nan" not in html and "inf" not in html
    assert "loss from 1.000 to 2.000 over 2 steps" in html


def test_lines_can_be_told_apart_without_their_dash() -> None:
    from nbqlora.view.run_charts import EVALUATION, PEAK, TRAINING

    for vision in ("full", "protanopia", "deuteranopia", "tritanopia"):
        one, two, three = (lightness_and_hue(c, vision) for c in (TRAINING, EVALUATION, PEAK))
        for a, b in ((one, two), (one, three), (two, three)):
            assert sum((p - q) ** 2 for p, q in zip(a, b, strict=True)) ** 0.5 > 13, vision
