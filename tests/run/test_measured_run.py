"""What a run measures of its memory: phases and holders in report and run.json, and in ``vram()`` while it is held."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import nbqlora
from nbqlora.core.events import StepEvent
from nbqlora.core.specs import MemoryCategory as M
from nbqlora.memory.probe import vram
from nbqlora.memory.profile import latest
from tests.train.parts import finetune

SEEN: dict[str, Any] = {}


def observe(event: Any) -> None:
    """What a live view can see in the middle of the run."""
    if isinstance(event, StepEvent):
        profile = latest()
        assert profile is not None
        SEEN.setdefault("phases", []).append(profile.phase)
        SEEN["during"] = vram()
        SEEN["snapshot"] = profile.snapshot()


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tiny_rows: Any, tmp_path_factory: pytest.TempPathFactory) -> nbqlora.Run:
    out = tmp_path_factory.mktemp("measured")
    return finetune(tiny_folder, tiny_rows, out, eval_data=tiny_rows[:3], observe=observe, save_minutes=1e-6)


def test_every_phase_is_there_and_none_else(run: nbqlora.Run) -> None:
    memory = run.report.memory
    assert memory is not None and memory.kind == "cpu"
    assert [p.phase for p in memory.phases] == ["load", "forward", "backward", "optimizer", "eval", "save"]
    assert all(p.peak_bytes >= p.after_bytes > 0 for p in memory.phases)
    assert memory.highest is not None
    assert run.report.measured_peak_bytes >= memory.highest.peak_bytes
    assert set(SEEN["phases"]) == {"optimizer"} and SEEN["snapshot"].highest is not None


def test_holders_are_counted_and_agree_with_the_plan(run: nbqlora.Run) -> None:
    memory, plan = run.report.memory, run.plan.budget.by_category
    assert memory is not None and memory.highest is not None
    held = memory.by_category
    for category in (M.ADAPTER, M.GRADIENTS):
        assert held[category] == pytest.approx(plan[category], rel=0.02), category
    assert held[M.OPTIMIZER] == pytest.approx(2 * held[M.GRADIENTS], rel=0.02)
    # With scales it is what the plan says; in a model so small the tables of their codes weigh too.
    assert plan[M.WEIGHTS] <= held[M.WEIGHTS] <= 1.15 * plan[M.WEIGHTS]
    assert held[M.CONTEXT] == run.plan.device.context_bytes
    assert sum(held.values()) >= memory.highest.peak_bytes


def test_report_and_file_say_it(run: nbqlora.Run) -> None:
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in str(run).splitlines()}
    assert lines["phases"].startswith("highest in ") and lines["holders"].startswith("measured (planned)")
    assert "activations, loss" in str(run._repr_html_())
    record = json.loads((run.adapter_dir.parent / "run.json").read_text())["memory"]
    assert [p["phase"] for p in record["phases"]] == ["load", "forward", "backward", "optimizer", "eval", "save"]
    assert record["by_category"]["adapter"] > 0 and "samples" not in record


def test_vram_knows_what_a_run_holds_and_what_is_given_back(run: nbqlora.Run) -> None:
    during = SEEN["during"]
    assert min(during.by_category[c] for c in (M.WEIGHTS, M.ADAPTER)) > 0
    assert during.reclaimable == (M.CACHE,), "nothing of a run under way"
    finished = vram()
    assert finished.by_category[M.WEIGHTS] > 0 and finished.by_category[M.OPTIMIZER] == 0
    assert set(finished.reclaimable) == {M.WEIGHTS, M.ADAPTER, M.CACHE}
    run.free()
    assert M.WEIGHTS not in vram().by_category
    assert vram().reclaimable == (M.CACHE,)
