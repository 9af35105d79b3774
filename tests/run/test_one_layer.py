"""The smallest decoder there is."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from tests.run.resuming import finetune


def test_a_model_of_one_layer_is_planned_trained_and_merged(tmp_path: Path) -> None:
    model = tiny.save_model(tmp_path / "model", num_hidden_layers=1)
    run = finetune(model, tmp_path / "out", max_steps=2)
    assert run.status == "done" and len(run.plan.layer_policies) == 1
    assert run.plan.model.linear_shapes["q_proj"] == (64, 64)
    report = run.merge(tmp_path / "merged")
    assert report.n_changed == 7 and report.check is not None and report.check.agrees
