"""The widgets in a real page: sliders, buttons, answers and tooltips work, and what stands there can be read."""

from __future__ import annotations

import re

import pytest

from tests.browser.fronts import Front

pytestmark = pytest.mark.browser

SETUP = """%load_ext nbqlora
import json, nbqlora
rows = json.load(open("rows.json"))
run1 = nbqlora.finetune(name="run1", model="tiny", data=rows, max_length=96, max_steps=6, learning_rate=0.02)"""
PLANNER = 'nbqlora.planner_widget("tiny", rows, max_length=256, card="T4")'
COMPARE = 'nbqlora.compare_widget(run1, "sun moon", temperature=1.0, max_new_tokens=48)'
TIMELINE = "nbqlora.timeline(run1)"


def shots(front: Front, name: str, output: object) -> None:
    for dark in (False, True):
        front.picture(name, output, dark=dark)
    front.picture(name, output, narrow=True)
    front.picture(name, output)


def test_planner_compare_and_timeline(front: Front) -> None:
    front.open("widgets", [SETUP, PLANNER, COMPARE, TIMELINE])
    front.run(0)
    _planner(front)
    _compare(front)
    _timeline(front)


def _planner(front: Front) -> None:
    from playwright.sync_api import expect

    front.run(1)
    output = front.output(1)
    bar = output.locator('[role="img"][aria-label*="weights"]').first
    bar.wait_for()
    before, cell = bar.get_attribute("aria-label"), output.locator("textarea")
    assert "max_length = 256" in cell.input_value()
    front.nudge(output, "lora_r")
    expect(bar).not_to_have_attribute("aria-label", before or "")
    expect(cell).to_have_value(re.compile("lora_r = 32"))
    output.get_by_role("button", name="copy as a %%finetune cell").click()
    output.get_by_text("copied: paste it into a cell").wait_for()
    copied = front.page.evaluate("() => navigator.clipboard.readText()")
    assert copied == cell.input_value() and copied.startswith("%%finetune run1\n")
    shots(front, "planner", output.locator("textarea"))


def _compare(front: Front) -> None:
    from playwright.sync_api import expect

    front.run(2)
    output = front.output(2)
    panels = output.locator('[aria-live="polite"]')
    expect(panels).to_have_count(2)
    expect(panels.first).not_to_be_empty()
    output.locator("textarea").fill("river stone")
    output.locator("textarea").blur()
    button = output.get_by_role("button", name="ask both")
    button.click()
    expect(output.get_by_text("all 2")).to_be_visible()
    expect(button).to_be_enabled()
    output.get_by_text("all 2").click()
    assert output.locator("table tr").count() == 3
    shots(front, "compare", output.locator("table"))


def _timeline(front: Front) -> None:
    from playwright.sync_api import expect

    front.run(3)
    output = front.output(3)
    columns = output.locator("figure svg g")
    columns.first.wait_for(state="attached")
    assert re.search(r"s, \w+: peak .* afterwards", columns.first.locator("title").text_content() or "")
    count = columns.count()
    shots(front, "timeline", output.get_by_role("button", name="save as PNG"))
    output.get_by_role("button", name="optimizer").click()
    expect(columns).not_to_have_count(count)
    output.get_by_role("button", name="save as PNG").click()
    output.get_by_text("saved runs").wait_for()
    assert (front.folder / "runs" / "run1" / "run1-memory.png").read_bytes().startswith(b"\x89PNG")
