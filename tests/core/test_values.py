"""Plan, report, events, memory: plain JSON on request, a short repr, and text without a view."""

import json
import pickle
from dataclasses import fields
from typing import Any

import pytest

from nbqlora.core import display, events
from nbqlora.core.data_report import DataReport, Preview
from nbqlora.core.events import (
    DataEvent,
    EvalEvent,
    Event,
    NoteEvent,
    OomEvent,
    PhaseEvent,
    PlannedEvent,
    SavedEvent,
    StepEvent,
    StoppedEvent,
)
from nbqlora.core.plain import plain
from nbqlora.core.plan import Decision, MemoryBudget, Plan, Replacement, SavedAdapter
from nbqlora.core.report import Comparison, Report, VramReport
from nbqlora.core.specs import DataStats, DeviceSpec, HeadSpec, LayerPolicy, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB


@pytest.fixture(autouse=True)
def no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nothing above ``core`` had been imported."""
    monkeypatch.setattr(display, "_text", {})
    monkeypatch.setattr(display, "_html", {})


MODEL = ModelSpec(
    name="demo", architecture="llama", n_layers=2, d_model=8, d_ff=16, n_heads=2, n_kv_heads=1, head_dim=4,
    vocab_size=32, n_params=134_515_008, n_linear_params=500, linear_shapes={"q_proj": (8, 8)},
    head=HeadSpec(tied=True),
)  # fmt: skip
DEVICE = DeviceSpec(
    kind="cuda", name="Tesla T4", total_bytes=15 * GIB, free_bytes=14 * GIB, context_bytes=GIB, host_free_bytes=GIB,
    disk_free_bytes=GIB, capability=(7, 5),
)  # fmt: skip
DATA = DataStats(
    n_rows=3, n_sequences=2, n_tokens=30, n_supervised_tokens=12, max_tokens=14, percentiles=(5, 6, 7, 8, 14),
    n_skipped={"nothing to learn from": 1}, source="demo (train)",
)  # fmt: skip
PLAN = Plan(
    model=MODEL, device=DEVICE, data=DATA, dtype="fp16", load_in_4bit=True, micro_batch_size=3,
    gradient_accumulation_steps=5, max_length=1024, layer_policies=(LayerPolicy.KEEP, LayerPolicy.RECOMPUTE),
    loss_chunk_tokens=512, total_steps=8, step_seconds=None, usable_bytes=13 * GIB,
    budget=MemoryBudget(by_category={MemoryCategory.WEIGHTS: 5 * GIB, MemoryCategory.LOSS: GIB}),
    output_dir="runs/run", disk_bytes=GIB, decisions=(Decision(name="batch", value="3 x 1024", because="it fits"),),
    notes=("a note",), unknowns=("the time",),
)  # fmt: skip
STEP = StepEvent(
    elapsed_seconds=1.5, step=1, total_steps=8, loss=2.5, learning_rate=1e-4, grad_norm=None, n_tokens=30, seconds=0.5,
    peak_bytes=GIB,
)  # fmt: skip
REPORTED = DataReport(
    stats=DATA, n_read=4, max_length=14, histogram=((5, 9, 2), (10, 14, 1)),
    previews=(Preview(row=1, why="the first", n_tokens=2, n_cut_tokens=0, pieces=(("private text", True),)),),
)  # fmt: skip
EVENTS: tuple[Event, ...] = (
    PhaseEvent(elapsed_seconds=0.0, phase="look"),
    DataEvent(elapsed_seconds=0.25, report=REPORTED),
    PlannedEvent(elapsed_seconds=0.5, plan=PLAN),
    STEP,
    EvalEvent(elapsed_seconds=2.0, step=1, loss=2.25),
    SavedEvent(elapsed_seconds=2.5, step=1, path="runs/run", n_bytes=10),
    StoppedEvent(elapsed_seconds=3.0, step=1, reason="interrupted"),
    NoteEvent(elapsed_seconds=3.5, text="a note"),
    OomEvent(elapsed_seconds=4.0, step=2, phase="backward", asked_bytes=1 << 31, action="the loss takes 64 tokens"),
)
REPORT = Report(
    name="run1", plan=PLAN, status="done", events=EVENTS, tokens_per_second=60.0, measured_peak_bytes=GIB, seconds=4.0,
    adapter=SavedAdapter(path="runs/run1", n_bytes=10, sha256="ab"), versions={"torch": "2.11"},
    replacements=(Replacement(path="model", old="a", new="b", because="c"),),
)  # fmt: skip
VRAM = VramReport(
    kind="cuda", name="Tesla T4", total_bytes=15 * GIB, used_bytes=GIB, free_bytes=14 * GIB, peak_bytes=0,
    by_category={MemoryCategory.OTHER_PROCESSES: GIB}, host_total_bytes=GIB, host_free_bytes=GIB, process_bytes=GIB,
    disk_free_bytes=GIB, disk_path="/", measured_by="nvml",
)  # fmt: skip
SHOWN = {
    "Plan(demo -> Tesla T4, fp16, 3 x 1024 tokens, accumulation 5, 8 steps)": PLAN,
    "Report(run1: done, 1 steps, loss 2.500)": REPORT,
    "VramReport(Tesla T4: 14.0 GiB free of 15.0 GiB)": VRAM,
    "Comparison(1 prompt)": Comparison(rows=(("a", "b", "c"),)),
    "Comparison(2 prompts)": Comparison(rows=(("a", "b", "c"), ("d", "e", "f"))),
}


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value, allow_nan=False))


@pytest.mark.parametrize("value", [PLAN, REPORT, VRAM, *EVENTS], ids=lambda v: type(v).__name__)
def test_as_dict_is_plain_json(value: Any) -> None:
    assert through_json(value.as_dict()) == value.as_dict()


def test_every_kind_of_event_is_tested_here() -> None:
    kinds = {k for k in vars(events).values() if isinstance(k, type) and issubclass(k, Event) and k is not Event}
    assert kinds == {type(e) for e in EVENTS}


def test_an_event_says_its_kind() -> None:
    assert STEP.as_dict() == {
        "kind": "StepEvent", "elapsed_seconds": 1.5, "step": 1, "total_steps": 8, "loss": 2.5, "learning_rate": 1e-4,
        "grad_norm": None, "n_tokens": 30, "seconds": 0.5, "peak_bytes": GIB,
    }  # fmt: skip
    assert EVENTS[2].as_dict() == {"kind": "PlannedEvent", "elapsed_seconds": 0.5}


def test_a_figure_that_is_not_finite_is_none() -> None:
    event = EvalEvent(elapsed_seconds=1.0, step=1, loss=float("nan"))
    assert event.as_dict() == {"kind": "EvalEvent", "elapsed_seconds": 1.0, "step": 1, "loss": None}
    assert plain({"a": (float("inf"), -float("inf"), 1.5)}) == {"a": [None, None, 1.5]}


def test_a_plan_as_dict() -> None:
    got = PLAN.as_dict()
    assert set(got) == {f.name for f in fields(Plan)}
    assert got["layer_policies"] == ["keep", "recompute"]
    assert got["budget"] == {"weights": 5 * GIB, "loss": GIB}
    assert got["model"]["linear_shapes"] == {"q_proj": [8, 8]}
    assert got["model"]["head"]["tied"] is True
    assert got["decisions"] == [{"name": "batch", "value": "3 x 1024", "because": "it fits"}]
    assert got["data"]["n_skipped"] == {"nothing to learn from": 1}


def test_a_report_as_dict() -> None:
    got = REPORT.as_dict()
    assert got["adapter"] == {"path": "runs/run1", "n_bytes": 10, "sha256": "ab"}
    assert got["replacements"] == [{"path": "model", "old": "a", "new": "b", "because": "c"}]
    assert [e["kind"] for e in got["events"]] == [type(e).__name__ for e in EVENTS]
    assert got["plan"] == PLAN.as_dict()
    assert (got["predicted_peak_bytes"], got["measured_peak_bytes"]) == (6 * GIB, GIB)
    nothing = Report(name="r", plan=PLAN, status="failed", events=(), tokens_per_second=None, measured_peak_bytes=0,
                     seconds=0.0, adapter=None)  # fmt: skip
    assert (nothing.as_dict()["adapter"], nothing.as_dict()["versions"]) == (None, {})
    assert repr(nothing) == "Report(r: failed, 0 steps)"


def test_memory_as_dict() -> None:
    assert set(VRAM.as_dict()) == {f.name for f in fields(VramReport)}
    assert VRAM.as_dict()["by_category"] == {"other_processes": GIB}


def test_derived_figures() -> None:
    assert (PLAN.effective_batch_size, PLAN.predicted_peak_bytes) == (15, 6 * GIB)
    assert (REPORT.steps, REPORT.evals) == ((STEP,), (EVENTS[4],))
    assert DATA.mean_tokens == 10.0
    assert MemoryCategory.OTHER_PROCESSES.label == "other processes"
    assert MODEL.tied


@pytest.mark.parametrize("text", SHOWN)
def test_repr_is_short_and_stable(text: str) -> None:
    assert repr(SHOWN[text]) == text


@pytest.mark.parametrize("value", SHOWN.values(), ids=lambda v: type(v).__name__)
def test_without_a_view_text_is_the_repr(value: Any) -> None:
    assert str(value) == repr(value) == f"{value}"
    assert value._repr_html_() is None


def test_a_view_is_registered_for_one_type() -> None:
    display.register(Plan, text=lambda plan: f"plan of {plan.model.name}", html=lambda plan: "<b>plan</b>")
    assert (str(PLAN), PLAN._repr_html_()) == ("plan of demo", "<b>plan</b>")
    assert repr(PLAN).startswith("Plan(demo -> ")
    assert (str(REPORT), REPORT._repr_html_()) == (repr(REPORT), None)


def test_values_are_pickled_small() -> None:
    again = pickle.loads(pickle.dumps(REPORT))
    assert again == REPORT
    assert len(pickle.dumps(REPORT)) < 5000


def test_tensors_never_get_into_a_dict() -> None:
    torch = pytest.importorskip("torch")
    big = torch.zeros(1000, 1000)
    assert plain({"weights": big, "list": [big]}) == {
        "weights": "<Tensor of 1000 rows>", "list": ["<Tensor of 1000 rows>"],
    }  # fmt: skip


def test_a_data_event_copies_counts_and_no_row() -> None:
    kept = json.dumps([e.as_dict() for e in EVENTS])
    assert '"n_read": 4' in kept
    assert "private text" not in kept


def test_ipython_shows_the_whole_and_not_the_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    from IPython.lib.pretty import pretty

    monkeypatch.setitem(display._text, Plan, lambda plan: "the whole plan")
    assert pretty(PLAN) == "the whole plan"
    assert repr(PLAN).startswith("Plan(")
