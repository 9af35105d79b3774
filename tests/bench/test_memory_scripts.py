"""frontier.py and planned_peaks.py on a CPU with a tiny model: that every plan is run, and judged as it should be."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec
from nbqlora.planner import make_plan
from tests.bench import engine, frontier, make_model, planned_peaks
from tests.bench.replanned import Replanned, replanned, rows_of
from tests.planner.shapes import GIB, MODELS, card
from tests.quick import quick_runs

H200 = replace(card("H200", 139, bf16=True, flops=7e14, capability=(9, 0)), host_free_bytes=100 * GIB)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:  # wide enough that tiles of an MLP save something
        patch.setitem(make_model.SHAPES["llama-tiny"], "intermediate_size", 2048)
        make_model.make_model("llama-tiny:4", folder / "llama-tiny")
    return folder


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "ENVIRONMENT", {})  # a process's own


def live_bytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def lines_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def run_frontier(models: Path, out: Path, *points: str) -> tuple[int, list[dict[str, Any]]]:
    size = ["--seq", "64", "--bs", "4", "--steps", "2", "--warmup", "1"]
    code = frontier.main([str(models / "llama-tiny"), *points, *size, "--out", str(out)])
    return code, lines_in(out)


def test_a_frontier_is_a_line_a_point(models: Path, tmp_path: Path) -> None:
    code, (small, large) = run_frontier(models, tmp_path / "lines", "0.1", "4:1")
    assert code == 0
    assert "tok_s" not in small and "and has 0.10 GiB" not in small["does_not_fit"] and "GiB" in small["does_not_fit"]
    assert large["tok_s"] == pytest.approx(4 * 64e3 / large["step_ms"], rel=0.02)
    assert (large["vram_gib"], large["ram_gib"], large["layers"]) == (4.0, 1.0, {"keep": 4})
    assert large["peak_gib"] is large["within"] is None
    assert {"versions", "command", "date", "card", "planned_gib", "planned_tok_s", "reserved_gib"} <= large.keys()
    assert str(tmp_path) not in json.dumps([small, large]) and str(models) not in json.dumps([small, large])


def test_a_point_that_fails_or_takes_too_much_is_told(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Replanned.run

    def full_at_first(self: Replanned, plan: Plan, *more: Any, **options: Any) -> Any:
        if plan.usable_bytes == 3 * GIB:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, plan, *more, **options)

    monkeypatch.setattr(Replanned, "run", full_at_first)
    code, (failed, fine) = run_frontier(models, tmp_path / "lines", "3", "4")
    assert code == 1 and failed["error"] == "OutOfMemoryError: CUDA out of memory" and fine["tok_s"] > 0
    for within, expected in ((True, True), (None, True), (False, False)):
        monkeypatch.setattr(frontier, "measure", lambda *_, within=within: {"within": within})
        assert frontier.point(None, frontier.Work(seq=1, bs=1), 1.0, 0.0)[1] is expected  # type: ignore[arg-type]


def test_without_a_card_no_peak_is_checked(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [case for some in planned_peaks.CASES.values() for case in some]
    monkeypatch.setattr(planned_peaks, "CASES", {"bf16": cases})  # a CPU takes minutes for products in fp16
    out = tmp_path / "lines"
    arguments = ["--models", str(models), "--shapes", "llama-tiny", "--divide", "8", "--out", str(out)]
    assert planned_peaks.main(arguments) == 2
    lines = lines_in(out)
    assert [line["right"] for line in lines] == [None] * len(lines), lines
    assert len(lines) == len(cases) == 11
    assert [bool(line["mlp_tile_tokens"]) for line in lines] == [line["tiles"] for line in lines]
    assert {policy for line in lines for policy in line["layers"]} == {
        "keep", "recompute_mlp", "recompute", "offload", "join",
    }  # fmt: skip
    assert "0 of 11 peaks planned within -1.0 and +3.0 %, 11 unchecked" in capsys.readouterr().out


def test_the_verdict() -> None:
    def code(*right: bool | None) -> int:
        return planned_peaks.verdict([{"right": each} for each in right])

    assert (code(True, True), code(True, None), code(True, False, None), code(False)) == (0, 2, 1, 1)


@dataclass
class OnACard:
    """Plans of a real model's shape, without it."""

    name: str
    dtype: str

    @property
    def loaded(self) -> Any:
        return SimpleNamespace(spec=MODELS[self.name])

    def plan(self, data: DataStats, **options: Any) -> Plan:
        config = FinetuneConfig(model="m", data=[], dtype=self.dtype, **options)
        return make_plan(config, MODELS[self.name], H200, data, output_dir=".")


@pytest.mark.parametrize("name", ["1B", "3B", "8B"])
def test_every_configuration_has_a_plan_for_the_real_sizes(name: str) -> None:
    cases = [(dtype, case) for dtype, some in planned_peaks.CASES.items() for case in some]
    assert 3 * len(cases) >= 24 and len({case.layout for _, case in cases}) == 3
    for dtype, case in cases:
        plan = planned_peaks.plan_of(OnACard(name, dtype), case)  # type: ignore[arg-type]
        assert bool(plan.mlp_tile_tokens) == case.tiles, case
        assert (plan.micro_batch_size, plan.max_length, plan.data.layout.value) == (case.rows, case.tokens, case.layout)
        steps = planned_peaks.steps_of(case, torch.Generator())
        assert max(batch["input_ids"].numel() for (batch,) in steps) == case.rows * case.tokens
        assert len({batch["input_ids"].numel() for (batch,) in steps}) == (1 if case.layout == "padded" else 6)


def test_a_plan_leaves_nothing_for_the_next_one(models: Path) -> None:
    data, numbers = DataStats.full(4, 64), torch.Generator().manual_seed(0)
    size: dict[str, Any] = {"max_length": 64, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    steps = [[rows_of(2, 64, numbers) for _ in range(2)] for _ in range(2)]
    held, before = [], live_bytes()
    with replanned(models / "llama-tiny", dtype="bf16", r=4) as stand:
        for layers in ("none", {"recompute": 1, "join": 3}, "offload", "none"):
            plan = stand.plan(data, gradient_checkpointing=layers, **size)
            found = stand.run(plan, steps)
            assert len(found.losses) == len(found.seconds) == 2
            held.append(live_bytes())
        # Only the slab of layers that offload stays until the next plan.
        assert held[0] == held[1] == held[3] <= held[2]
        del stand, found
    assert live_bytes() == before


def test_the_machine_is_looked_at_before_the_model_lies_there(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[DeviceSpec] = []
    monkeypatch.setattr("tests.bench.replanned.device_spec", lambda path: looks.append(H200) or H200)
    with replanned(models / "llama-tiny", dtype="bf16", r=4) as stand:
        assert len(looks) == 1 and stand.machine is H200
        assert stand.plan(DataStats.full(1, 64), vram_gib=1.0).usable_bytes == GIB
