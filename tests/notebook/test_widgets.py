"""The widgets by themselves, on a real run: what they show, what they do, and what stands where there are none."""

from __future__ import annotations

import re

import ipywidgets
import pytest
import torch

import nbqlora
from nbqlora.core.errors import ConfigError, RunError
from nbqlora.core.request import parse_toml
from nbqlora.notebook.planner_widget import cell_text
from nbqlora.run.talking import answer
from tests.quick import quick_runs

WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def run(tiny_folder, tiny_rows, tmp_path_factory):
    with quick_runs():
        folder = tmp_path_factory.mktemp("widgets")
        yield nbqlora.finetune(
            name="run1", model=str(tiny_folder), data=tiny_rows, max_length=96, max_steps=4, learning_rate=0.05,
            output_dir=str(folder), eval_data=tiny_rows[:2], lora_r=4,
        )  # fmt: skip


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setenv("NBQLORA_DISPLAY", "live")


def body_of(cell):
    return parse_toml(cell.split("\n", 1)[1], namespace={"rows": [1]}).options


def test_the_planner_shows_the_plan_that_a_run_would_have(live, tiny_folder, tiny_rows):
    options = {"max_length": 96, "lora_r": 4, "max_steps": 3}
    planner = nbqlora.planner_widget(str(tiny_folder), tiny_rows, **options)
    plan = nbqlora.plan(model=str(tiny_folder), data=tiny_rows, **options)
    assert planner.fit.plan.micro_batch_size == plan.micro_batch_size
    assert planner.fit.plan.total_steps == plan.total_steps == 3
    assert planner.fit.plan.data == plan.data
    bundle = planner._repr_mimebundle_()
    assert planner.max_length.value == 96, "a value that is no step of the slider becomes one"
    assert bundle[WIDGET]["model_id"] == planner.widget.model_id
    assert bundle["text/plain"].startswith("plan  ") and 'role="img"' in bundle["text/html"]
    assert repr(planner).startswith("PlannerWidget(FitReport(")


def test_each_slider_changes_the_plan_and_the_cell(tiny_folder):
    planner = nbqlora.planner_widget(str(tiny_folder), card="T4", max_length=256)
    before = planner.fit.plan
    assert before.device.name == "T4" and before.data.max_tokens == 256
    assert planner.widget and planner.fit.plan is before
    planner.lora_r.value = 64
    assert planner.fit.plan.budget.total_bytes > before.budget.total_bytes
    planner.max_length.value = 512
    assert planner.fit.plan.data.max_tokens == 512
    planner.batch.value = 2
    assert planner.fit.plan.micro_batch_size == 2
    planner.vram_gib.value = 3.0
    assert planner.fit.plan.usable_bytes == 3 << 30
    assert planner.cell.splitlines() == [
        "%%finetune run1", f'model = "{tiny_folder}"', "max_length = 512", "lora_r = 64",
        "per_device_train_batch_size = 2", "vram_gib = 3.0", "data = ",
    ]  # fmt: skip
    planner.batch.value, planner.vram_gib.value = "auto", planner.vram_gib.max
    assert "per_device" not in planner.cell and "vram_gib" not in planner.cell
    assert planner._cell.value == planner.cell


def test_what_does_not_fit_is_said_with_the_change_that_would(tiny_folder):
    planner = nbqlora.planner_widget(str(tiny_folder), card="T4", max_length=256, vram_gib=0.01)
    assert planner.fit.plan is None
    twin = planner.twin()
    assert "it does not fit" in twin["text/plain"] and 'role="alert"' in twin["text/html"]
    assert len(twin["text/plain"].splitlines()) > 3


def test_an_option_that_is_wrong_is_an_error_and_a_card_too(tiny_folder):
    with pytest.raises(ConfigError, match="did you mean lora_r"):
        nbqlora.planner_widget(str(tiny_folder), lora_rank=3)
    with pytest.raises(ConfigError, match="expected one of T4, A100, H100, got 'T5'"):
        nbqlora.planner_widget(str(tiny_folder), card="T5")


def test_a_cell_reads_back_as_the_options_that_it_was_made_of():
    options = {
        "model": 'a "quoted" \\ name', "data": "demo", "packing": False, "learning_rate": 2e-5, "max_steps": -1,
        "target_modules": ("q_proj", "v_proj"), "gradient_checkpointing": {"keep": 2, "recompute": 1},
        "trl": {"adam_beta2": 0.95}, "peft": {"use_rslora": True},
    }  # fmt: skip
    read = body_of(cell_text(options))
    assert {**read, "target_modules": tuple(read["target_modules"])} == options
    assert body_of(cell_text({"model": "demo", "data": [1]}))["data"] == "$rows"


def test_both_models_answer_as_the_run_does(run, live):
    widget = nbqlora.compare_widget(run, "sun moon", max_new_tokens=12)
    assert widget.comparison == run.compare("sun moon", max_new_tokens=12)
    bundle = widget._repr_mimebundle_()
    assert WIDGET in bundle and "<table" in bundle["text/html"] and bundle["text/plain"].startswith("> sun moon")
    widget.prompt.value = "river"
    widget.ask.click()
    assert [row[0] for row in widget.comparison.rows] == ["sun moon", "river"]
    assert not widget.ask.disabled
    for tuned in (False, True):
        assert widget.comparison.rows[-1][1 + tuned] in widget._panels[tuned].value.replace("&lt;", "<")


def test_an_empty_prompt_is_not_asked(run):
    widget = nbqlora.compare_widget(run)
    assert widget.widget
    widget.ask.click()
    assert widget.comparison.rows == () and "write something" in widget._status.value
    assert "nothing was asked yet" in widget.twin()["text/plain"]


def test_answers_come_in_pieces_with_the_seed_s_draws_and_leave_torch_s_alone(run):
    state, pieces = torch.get_rng_state(), []
    asked = [{"role": "user", "content": "sun"}]
    settings = {"temperature": 1.5, "max_new_tokens": 24}
    first = answer(run, asked, pieces.append, tuned=False, seed=1, **settings)
    assert len(pieces) > 1 and pieces == sorted(pieces, key=len) and pieces[-1].strip() == first
    assert first == answer(run, asked, pieces.append, tuned=False, seed=1, **settings)
    assert first != answer(run, asked, pieces.append, tuned=False, seed=2, **settings)
    assert torch.equal(state, torch.get_rng_state())


def test_a_conversation_goes_on_when_it_is_asked_to(run):
    widget = nbqlora.compare_widget(run, max_new_tokens=8)
    widget.answer("sun")
    widget.answer("moon", go_on=True)
    assert [m["role"] for m in widget._turns[True]] == ["user", "assistant", "user", "assistant"]
    widget.answer("moon")
    assert len(widget._turns[True]) == 2


def test_the_timeline_shows_holders_and_phases_and_writes_a_png(run, live, tmp_path):
    shown = nbqlora.timeline(run)
    bundle = shown._repr_mimebundle_()
    assert WIDGET in bundle and bundle["image/png"].startswith(b"\x89PNG")
    html = bundle["text/html"]
    titles = re.findall(r"<title>(.*?)</title>", html)
    said = r"[\d.]+ s, \w+: peak .* GiB, afterwards .*; context .* activations"
    assert any(re.match(said, title) for title in titles), titles
    for phase in run.report.memory.phases:
        assert phase.phase in html and phase.phase in bundle["text/plain"]
    assert shown.save(tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")
    assert len(html) < 100_000
    before = shown._picture.value
    shown.phase.value = "eval"
    assert shown._picture.value != before and ", load: peak" not in shown._picture.value
    shown.keep.click()
    assert "saved" in shown._said.value


def test_a_run_without_measured_memory_has_no_timeline(run):
    from dataclasses import replace

    from nbqlora.notebook.timeline import Timeline

    with pytest.raises(RunError, match="has no memory to show"):
        Timeline(replace(run.report, memory=None), None)


def all_three(run, folder):
    return nbqlora.planner_widget(str(folder), card="T4"), nbqlora.compare_widget(run), nbqlora.timeline(run)


def test_static_mode_shows_the_twins_alone(run, tiny_folder, monkeypatch):
    monkeypatch.setenv("NBQLORA_DISPLAY", "static")
    for shown in all_three(run, tiny_folder):
        bundle = shown._repr_mimebundle_()
        assert WIDGET not in bundle and {"text/plain", "text/html"} <= {*bundle}
        assert not shown.shown, "state of controls would be kept in the notebook"


def test_widgets_are_from_the_core_alone(run, tiny_folder):
    def parts(widget):
        yield widget
        for child in getattr(widget, "children", ()):
            yield from parts(child)

    for shown in all_three(run, tiny_folder):
        for part in parts(shown.widget):
            assert type(part).__module__.startswith("ipywidgets.")
            assert isinstance(part, ipywidgets.DOMWidget)
