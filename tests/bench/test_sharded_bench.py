"""The script for split weights on a CPU: what it makes of what its processes saw, two of them, and a quick model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench import sharded
from tests.bench.make_model import make_model

SHAPE = sharded.Shape(
    how="split", model=Path("m"), seq=32, bs=2, dtype="bf16", r=4, layers="auto", vram_gib=None, steps=3, warmup=1,
    cards=2,
)  # fmt: skip


def told(**changes: Any) -> dict[str, Any]:
    found = {
        "seconds": [9.0, 0.5, 0.25, 1.0], "losses": [4.0, 3.0, 2.0, 1.0], "tokens": [128] * 4, "peak_bytes": 2**30,
        "load_seconds": 2.0, "trains_at": 107.5, "shards": 2, "planned_bytes": 2**31, "planned_seconds": 0.4,
        "policies": {"keep": 2}, "card": "a CPU",
    }  # fmt: skip
    return {**found, **changes}


def test_a_line_is_of_the_measured_steps_and_of_all_cards() -> None:
    line = sharded.figures(SHAPE, [told(load_seconds=3.0), told(peak_bytes=2**31 + 2**30)], 100.0)
    assert (line["tok_s"], line["step_ms"], line["planned_step_ms"]) == (256, 500.0, 400.0)
    assert (line["peak_gib"], line["planned_gib"], line["off_percent"]) == ([1.0, 3.0], 2.0, -33.33)
    assert (line["load_s"], line["start_s"]) == (3.0, 7.5)


@pytest.mark.parametrize("wrong", [{"shards": 1}, {"tokens": [128, 64, 128, 128]}])
def test_what_was_not_the_workload_is_no_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"shards, with steps of \["):
        sharded.figures(SHAPE, [told(**wrong), told()], 100.0)


def test_the_comparison() -> None:
    split, whole = (
        {"how": how, "tok_s": n, "peak_gib": peaks, "losses": [2.0, loss]}
        for how, n, peaks, loss in (("split", 90, [5.0, 6.0], 1.0), ("whole", 100, [8.0, 7.0], 1.25))
    )
    assert sharded.compared(split, whole) == {
        "compared_with": "whole", "speed": 0.9, "peak": 0.75, "loss_apart": 0.2,
    }  # fmt: skip


def test_a_profile_is_of_a_step_behind_the_measured_ones() -> None:
    kernels = {"launches": 3, "computes_ms": 1.5, "gathers_ms": 2.0}
    line = sharded.figures(SHAPE, [told(seconds=[9.0, 0.5, 0.25, 1.0, 7.0, 7.0], kernels=kernels), told()], 100.0)
    assert line["step_ms"] == 500.0
    assert kernels.items() <= line.items()


def test_collectives_are_told_from_what_computes() -> None:
    def event(name: str, ms: float, *, on: str = "CUDA", annotation: bool = False) -> Any:
        kind = getattr(torch.autograd.DeviceType, on)
        return SimpleNamespace(
            name=name, self_device_time_total=1e3 * ms, device_type=kind, is_user_annotation=annotation
        )

    events = [
        event("mm", 2.0), event("ncclDevKernel_AllGather", 3.0), event("nf4", 0.5), event("aten::mm", 9.0, on="CPU"),
        event("FSDP::all_gather", 3.0, annotation=True),
    ]  # fmt: skip
    assert sharded.times_of(events) == {"launches": 3, "computes_ms": 2.5, "gathers_ms": 3.0}


@pytest.mark.slow
def test_two_processes_on_a_cpu_and_a_model_whose_layers_are_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in sharded.ENVIRONMENT:
        monkeypatch.setenv(name, sharded.ENVIRONMENT[name])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_model("llama-tiny:4", tmp_path / "model", same_layers=True)
    size = ["--seq", "32", "--bs", "2", "--dtype", "bf16", "--r", "4", "--steps", "2", "--warmup", "1", "--profile"]
    sharded.main([str(tmp_path / "model"), *size, "--runs", "split", "fsdp", "--out", str(tmp_path / "lines")])
    line, example, comparison = [json.loads(text) for text in (tmp_path / "lines").read_text().splitlines()]
    assert [json.loads(text) for text in capfd.readouterr().out.splitlines()] == [line, example, comparison]
    assert example["policies"] == {"recompute": 4}
    assert (comparison["compared_with"], comparison["peak"]) == ("fsdp", None)
    assert sum(line["policies"].values()) == 4
    assert len(line["losses"]) == 5
    assert (line["launches"], line["computes_ms"]) == (0, 0.0)
    assert all(map(math.isfinite, line["losses"]))
    assert line["command"].startswith("python tests/bench/sharded.py FOLDER/model --seq 32")
