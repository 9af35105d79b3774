"""What a run says that found no memory: of which rank, for which work, and what was kept."""

from __future__ import annotations

from typing import Any

import pytest

from nbqlora.core.errors import MemoryExhaustedError
from nbqlora.core.events import SavedEvent
from nbqlora.planner import make_plan
from nbqlora.run.exhausted import with_what_fits
from tests.planner.shapes import DEVICES, MODELS, options, rows_of

SAVED = SavedEvent(step=3, path="out/adapter", n_bytes=1, elapsed_seconds=1.0)


def said(error: MemoryExhaustedError, *, writes: bool = True, events: Any = (SAVED,), **changes: Any) -> str:
    config = options(max_length=512, effective_batch_size=4, **changes)
    plan = make_plan(config, MODELS["1B"], DEVICES["T4"], rows_of(512), output_dir="r")
    return str(with_what_fits(error, config, plan, events, "", writes=writes))


def test_rows_may_be_too_long() -> None:
    text = said(MemoryExhaustedError("no rung is left", tokens=512))
    assert "max_length = 448 fits in the " in text
    assert text.endswith("all memory of this run was given back; the adapter of step 3 is in out/adapter")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, 'optim = "adamw_8bit" needs a quarter of the optimizer\'s states in the '),
        ({"optim": "adamw_8bit", "lora_r": 8}, "lora_r = 4 needs at most half of the optimizer's states in the "),
        ({"optim": "adamw_8bit", "lora_r": 1}, "the optimizer's states found no room in the "),
    ],
)
def test_no_row_is_too_long_for_the_optimizer(changes: dict[str, Any], words: str) -> None:
    text = said(MemoryExhaustedError("no rung is left"), **changes)
    assert words in text and "max_length" not in text


def test_a_rank_that_saves_nothing_does_not_know_what_was_kept() -> None:
    text = said(MemoryExhaustedError("no rung is left", tokens=512), writes=False, events=())
    assert text.endswith("all memory of this run was given back; rank 0 says what was kept")
    assert said(MemoryExhaustedError("no rung is left"), events=()).endswith("no step was taken before it")
