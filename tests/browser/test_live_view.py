"""The live view in a real page: it moves while a run goes, ■ stops it, and what is left reads on any page."""

from __future__ import annotations

import pytest

from tests.browser.fronts import Front

pytestmark = pytest.mark.browser

SETUP = '%load_ext nbqlora\nimport json\nrows = json.load(open("rows.json"))'
CELL = """%%finetune run1
model = "tiny"
data = "$rows"
eval_data = "$rows"
max_length = 96
max_steps = 100000
save_minutes = 0.05
"""


def test_a_run_is_watched_and_stopped(front: Front) -> None:
    from playwright.sync_api import expect

    front.open("live", [SETUP, CELL, "run1.status"])
    front.run(0)
    front.start(1)
    output = front.output(1)
    line = output.get_by_text("training · step").first
    line.wait_for()
    before = line.inner_text()
    output.locator("figure svg").nth(1).wait_for()
    expect(line).not_to_have_text(before)
    assert output.locator("progress").count() == 1
    assert output.get_by_text("■ stops after this step and saves").is_visible()
    output.get_by_text("▼ saved after step").first.wait_for()
    charts = output.locator("figure")
    for dark in (False, True):
        front.picture("live-running", charts, dark=dark)
    front.picture("live-running", charts, narrow=True)
    labels = output.locator('figure svg[role="img"]').evaluate_all("all => all.map(e => e.getAttribute('aria-label'))")
    assert labels[0].startswith("loss from") and "the plan said" in labels[1]
    front.interrupt()
    output.get_by_text("run1: stopped (interrupted) in").first.wait_for()
    front.wait(1)
    output.locator("img").wait_for()
    assert output.locator("progress").count() == 0
    assert output.locator("table th[scope=row]").count() > 5
    for dark in (False, True):
        front.picture("live-done", output.locator("img"), dark=dark)
    front.picture("live-done", output.locator("img"), narrow=True)
    front.run(2)
    assert "stopped" in front.output(2).inner_text()
