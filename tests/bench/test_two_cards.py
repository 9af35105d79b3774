"""What the script for several cards makes of what its processes saw, and one of its parts on a CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.bench import two_cards
from tests.bench.make_model import make_model
from tests.quick import quick_runs

SHAPE = two_cards.Shape(model=Path("m"), seq=32, bs=2, dtype="fp32", r=4, steps=3, warmup=1, cards=2)


def told(**changes: Any) -> dict[str, Any]:
    found = {
        "seconds": [9.0, 0.5, 0.25, 1.0], "losses": [4.0, 3.0, 2.0, 1.0], "tokens": [128] * 4, "peak_bytes": 2**30,
        "trains_at": 107.5, "planned_bytes": 2**29, "planned_seconds": 0.4, "sent_bytes": 4_000_000, "link": 1e9,
        "n_cards": 2, "card": "a CPU",
    }  # fmt: skip
    return {**found, **changes}


def test_a_line_is_of_the_measured_steps_and_of_all_cards() -> None:
    line = two_cards.figures(SHAPE, [told(), told(peak_bytes=2**31)], 100.0)
    assert (line["tok_s"], line["step_ms"], line["min_ms"]) == (256, 500.0, 250.0)
    assert (line["peak_gib"], line["planned_gib"], line["planned_step_ms"]) == ([1.0, 2.0], 0.5, 400.0)
    assert (line["sent_mb"], line["link_gb_s"], line["added_ms"], line["start_s"]) == (4.0, 1.0, 4.0, 7.5)


@pytest.mark.parametrize("wrong", [{"n_cards": 1}, {"tokens": [128, 64, 128, 128]}])
def test_what_was_not_the_workload_is_no_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"cards with steps of \["):
        two_cards.figures(SHAPE, [told(**wrong), told()], 100.0)


def test_the_comparison() -> None:
    one, two, accumulated = ({"tok_s": n, "cards": c, "losses": x} for n, c, x in (
        (100, 1, []), (194, 2, [2.0, 1.0]), (97, 1, [2.0, 1.25]),
    ))  # fmt: skip
    found = two_cards.compared(one, two, accumulated)
    assert found == {"cards": 2, "speedup": 1.94, "speedup_over_accumulating": 2.0, "loss_apart": 0.2}


def test_a_part_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    make_model("llama-tiny", tmp_path / "llama-tiny")
    shape = {
        "model": str(tmp_path / "llama-tiny"),
        "seq": 32,
        "bs": 2,
        "dtype": "fp32",
        "r": 4,
        "steps": 2,
        "warmup": 1,
    }
    with quick_runs():
        two_cards.main([two_cards.PART, json.dumps(shape), str(tmp_path / "told")])
    found = json.loads((tmp_path / "told-0").read_text())
    assert found["tokens"] == [64] * 3
    assert all(map(math.isfinite, found["losses"]))
    assert found["n_cards"] == 1
