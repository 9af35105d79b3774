"""A checkpoint of whole weights goes on where they are split over cards, and back: planned, without training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.config import validate
from nbqlora.core.request import CellRequest
from nbqlora.planner.cards import Cards
from nbqlora.run.look import look
from nbqlora.run.resume import Beginning, begin
from nbqlora.run.tables import table_fields
from tests.run.resuming import OPTIONS, ROWS, edit_state

pytestmark = pytest.mark.usefixtures("quick")


def resumed(model: Path, out: Path, then: dict[str, Any], **changes: Any) -> Beginning:
    """How a run of two cards goes on from a checkpoint with such a plan."""
    split = {"n_cards": 2, "micro_batch_size": 2, "gradient_accumulation_steps": 1}
    edit_state(out, 4, lambda state: state["state"]["plan"].update(split | then))
    options = {**OPTIONS, "model": str(model), "data": ROWS, "output_dir": str(out), "gpus": 2, **changes}
    config = validate(CellRequest(options=options), table_fields=table_fields)
    seen = replace(look(config, "run", lambda line: None), cards=Cards(per_node=2))
    return begin(config, seen, resume=True, how="resume")


def test_whole_goes_on_split_also_where_layers_joined(model, killed):
    begun = resumed(model, killed(4), {"layers": {"recompute": 1, "join": 1}}, fsdp=True)
    assert begun.checkpoint is not None and begun.plan.shards == 2
    assert any("weights whole -> split over 2 cards" in note for note in begun.plan.notes)
    assert not any(policy.value == "join" for policy in begun.plan.layer_policies)


def test_split_goes_on_whole(model, killed):
    begun = resumed(model, killed(4), {"shards": 2})
    assert begun.checkpoint is not None and begun.plan.shards == 1
    assert any("weights split over 2 cards -> whole" in note for note in begun.plan.notes)
