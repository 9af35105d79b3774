"""Plans, reports, events and comparisons as text and HTML, of values made by hand: no machine decides a line."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import pytest

from nbqlora import view
from nbqlora.core.events import EvalEvent, PhaseEvent, SavedEvent, StepEvent, StoppedEvent
from nbqlora.core.plan import Decision, MemoryBudget, Plan, Replacement, SavedAdapter
from nbqlora.core.report import Comparison, Report
from nbqlora.core.specs import DataStats, DeviceSpec, HeadSpec, LayerPolicy, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB
from nbqlora.view.figures import run_figure
from nbqlora.view.text import event_line

view.register_all()

MODEL = ModelSpec(
    name="some/llama-8b", architecture="llama", n_layers=32, d_model=4096, d_ff=14336, n_heads=32, n_kv_heads=8,
    head_dim=128, vocab_size=128256, n_params=8_030_261_248, n_linear_params=6_979_321_856,
    linear_shapes={"q_proj": (4096, 4096)}, head=HeadSpec(tied=False),
)  # fmt: skip
T4 = DeviceSpec(
    kind="cuda", name="Tesla T4", total_bytes=int(14.74 * GIB), free_bytes=int(14.3 * GIB), capability=(7, 5),
    context_bytes=int(0.4 * GIB), host_free_bytes=12 * GIB, disk_free_bytes=41 * GIB,
)  # fmt: skip
DATA = DataStats(
    n_rows=900, n_sequences=900, n_tokens=310_000, n_supervised_tokens=120_000, max_tokens=1024,
    percentiles=(90, 200, 340, 500, 800), n_eval_rows=50,
)  # fmt: skip
PLAN = Plan(
    model=MODEL, device=T4, data=DATA, dtype="fp16", load_in_4bit=True, micro_batch_size=2,
    gradient_accumulation_steps=8, max_length=1024,
    layer_policies=(LayerPolicy.RECOMPUTE,) * 8 + (LayerPolicy.KEEP,) * 24,
    loss_chunk_tokens=256, total_steps=57, step_seconds=43.0, usable_bytes=int(13.8 * GIB),
    budget=MemoryBudget(
        by_category={MemoryCategory.WEIGHTS: int(5.3 * GIB), MemoryCategory.ACTIVATIONS: int(7.1 * GIB)}
    ),
    output_dir="runs/run1", disk_bytes=170 << 20,
    decisions=(Decision(name="batch", value="2 rows at once, accumulation 8", because="4 rows would be 7 % slower"),),
    notes=("runs/run1 disappears with this session",), unknowns=("the time",),
)  # fmt: skip


def step(number: int, loss: float) -> StepEvent:
    return StepEvent(
        step=number, total_steps=57, loss=loss, learning_rate=2e-4, grad_norm=1.0, n_tokens=5000, seconds=40.0,
        peak_bytes=int(12.9 * GIB), elapsed_seconds=40.0 * number,
    )  # fmt: skip


REPORT = Report(
    name="run1", plan=PLAN, status="stopped", reason="interrupted", seconds=95.0, tokens_per_second=125.0,
    events=(EvalEvent(step=0, loss=2.5, elapsed_seconds=1), step(1, 2.4), step(2, 1.9),
            EvalEvent(step=2, loss=1.8, elapsed_seconds=90)),
    measured_peak_bytes=int(12.9 * GIB),
    adapter=SavedAdapter(path="runs/run1/adapter", n_bytes=170 << 20, sha256="0"),
    replacements=(
        Replacement(path="lm_head", old="all logits", new="chunked loss", because="same loss on a probe"),
        Replacement(path="model.layers.3", old="x", new="", because="it does not match"),
    ),
)  # fmt: skip


def test_plan():
    assert str(PLAN).splitlines() == [
        "plan  some/llama-8b (8.03B) -> Tesla T4, 13.8 GiB of 14.7 GiB usable, fp16",
        "  data       900 rows, 310k tokens, 120k learned    rows of 340 tokens in the middle, 1024 at most",
        "  batch      2 rows at once, accumulation 8         4 rows would be 7 % slower",
        "  peak       12.4 GiB                               = activations 7.1 GiB + weights 5.3 GiB",
        "  time       57 steps, about 41 min                 a forecast, corrected after the first step",
        "  saves to   runs/run1                              adapter 0.17 GiB, 41.0 GiB free",
        "  note       runs/run1 disappears with this session",
        "  unknown    the time",
    ]
    assert repr(PLAN) == "Plan(some/llama-8b -> Tesla T4, fp16, 2 x 1024 tokens, accumulation 8, 57 steps)"


def test_report():
    assert str(REPORT).splitlines() == [
        "run1: stopped (interrupted) in 1 min 35 s",
        "  steps      2 of 57                                loss 2.400 -> 1.900",
        "  eval       50 rows                                loss 2.500 -> 1.800",
        "  speed      125 tokens/s                           1 min 20 s of training",
        "  peak       12.9 GiB                               the plan said 12.4 GiB",
        "  adapter    runs/run1/adapter                      0.17 GiB",
        "  left as is model.layers.3                         it does not match",
        "  engine     lm_head: chunked loss                  same loss on a probe",
    ]


def test_peaks_of_ranks():
    of_two = dataclasses.replace(REPORT, rank_peaks=(int(12.9 * GIB), int(12.5 * GIB)))
    row = "  peak       12.9 GiB                               the plan said 12.4 GiB; by rank 12.9 GiB, 12.5 GiB"
    assert row in str(of_two).splitlines()


def test_a_report_without_a_step():
    bare = dataclasses.replace(REPORT, events=(), adapter=None, measured_peak_bytes=0, tokens_per_second=None)
    assert str(bare).splitlines()[0] == "run1: stopped (interrupted) in 1 min 35 s"
    assert repr(bare) == "Report(run1: stopped, 0 steps)"


def test_comparison():
    table = Comparison(rows=(("Why?", "Well.\nIt is so.", "In short: <b>\nBecause: x"), ("And?", "", "y")))
    assert str(table).splitlines() == [
        "> Why?",
        "  base  Well.",
        "        It is so.",
        "  tuned In short: <b>",
        "        Because: x",
        "",
        "> And?",
        "  base  (nothing)",
        "  tuned y",
    ]
    html = table._repr_html_()
    assert "In short: &lt;b&gt;<br>Because: x" in html
    assert "<em>(nothing)</em>" in html


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (PhaseEvent(phase="load", detail="demo in NF4", elapsed_seconds=0), "[load] demo in NF4"),
        (step(2, 1.9), "  step 2/57  loss 1.900  125 tokens/s  peak 12.9 GiB"),
        (EvalEvent(step=2, loss=1.8, elapsed_seconds=0), "  eval after step 2  loss 1.800"),
        (SavedEvent(step=2, path="a/b", n_bytes=1 << 20, elapsed_seconds=0), "  saved a/b (1 MiB)"),
        (StoppedEvent(step=2, reason="interrupted", elapsed_seconds=0), "  stopped after step 2: interrupted"),
    ],
)
def test_event_lines(event, line):
    assert event_line(event) == line


class _Balanced(HTMLParser):
    """Fails on tags that do not close."""

    VOID = frozenset({"br", "img"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("value", [PLAN, REPORT], ids=["plan", "report"])
def test_html_says_what_the_text_says(value):
    html = value._repr_html_()
    parser = _Balanced()
    parser.feed(html)
    assert parser.open == []
    said = " ".join(" ".join(parser.text).split())
    for line in str(value).splitlines():
        for part in line.split("  "):
            if part.strip() and not part.strip().startswith(("plan", "peak", "=", "12.4")):
                assert part.strip() in said, part
    assert len(html) < 15_000


def test_markup_in_names_is_escaped():
    evil = dataclasses.replace(PLAN, model=dataclasses.replace(MODEL, name="<script>x</script>"), notes=("<img>",))
    html = evil._repr_html_()
    assert "<script>" not in html
    assert "<img>" not in html


def test_the_figure_shows_loss_eval_peak_and_plan():
    figure = run_figure(REPORT)
    loss, memory = figure.axes
    assert [list(line.get_ydata()) for line in loss.lines] == [[2.4, 1.9], [2.5, 1.8]]
    assert list(memory.lines[1].get_ydata()) == pytest.approx([12.4, 12.4], abs=0.01)
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_names_of_phases_do_not_lie_over_each_other():
    steps = [dataclasses.replace(e, elapsed_seconds=50.0 * (i + 1)) for i, e in enumerate(REPORT.steps)]
    began = {"look": 50.0, "load": 50.2, "train": 50.4, "save": 99.0, "stop": 99.1}
    phases = [PhaseEvent(phase=name, elapsed_seconds=at) for name, at in began.items()]
    _, memory = run_figure(dataclasses.replace(REPORT, events=(*steps, *phases))).axes
    names = {text.get_text().strip(): text.get_position()[0] for text in memory.texts}
    assert names == {"look · load · train": 50.0, "save · stop": 99.0}
