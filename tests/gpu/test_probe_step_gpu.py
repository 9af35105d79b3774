"""The probe step on a card: what it measures is what the run takes, and the run takes the same steps as without it."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.events import NoteEvent
from nbqlora.core.units import GIB, MIB
from tests import tiny
from tests.gpu.test_oom_gpu import At, all_of_the_card, allocated, limit, same, train

__all__ = ["all_of_the_card"]  # autouse
pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {
    "max_length": 96, "effective_batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 3, "lora_r": 4,
    "learning_rate": 1e-2, "lora_dropout": 0.1,
}  # fmt: skip
ALIKE = {"bf16": 2e-3, "fp16": 5e-4}


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_the_same_losses_as_without_it(dtype, packing, optim, tiny_folder, tmp_path, monkeypatch):
    options = {**OPTIONS, "dtype": dtype, "packing": packing, "optim": optim, "model": str(tiny_folder),
               "data": tiny.make_rows(24)}  # fmt: skip
    if packing:
        options |= {"max_steps": 9, "effective_batch_size": 2, "per_device_train_batch_size": 1}
    found = nbqlora.finetune(**options, output_dir=str(tmp_path / "with"))
    monkeypatch.setattr("nbqlora.run.job.probes", lambda device: False)
    without = nbqlora.finetune(**options, output_dir=str(tmp_path / "without"))
    assert found.plan.probed is not None and without.plan.probed is None
    apart = [abs(a.loss - b.loss) for a, b in zip(found.report.steps, without.report.steps, strict=True)]
    print(f"{dtype} packing={packing} {optim}: losses differ by at most {max(apart):.2e}")
    # Dropout comes from the card's own generator: a state that was moved differs in the second digit.
    assert max(apart) <= ALIKE[dtype]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("layers", ["none", "full"])
def test_it_measures_what_the_run_takes(dtype: str, layers: str, medium_folder: Path, tmp_path: Path) -> None:
    segments: list[Any] = []

    def observe(event: Any) -> None:
        if isinstance(event, NoteEvent) and event.text.startswith("corrected after the probe"):
            print(event.text)
            segments.extend(torch.cuda.memory_snapshot())

    run = train(medium_folder, tmp_path, observe, dtype=dtype, gradient_checkpointing=layers, max_steps=8)
    probed, memory = run.plan.probed, {p.phase: p.peak_bytes for p in run.report.memory.phases}
    assert probed is not None and run.plan.predicted_peak_bytes != probed.peak_bytes
    print(f"{dtype} {layers}: probe {probed}, phases {memory}, planned {run.plan.predicted_peak_bytes}")
    assert probed.peak_bytes == memory["probe"] == pytest.approx(memory["step"], rel=0.02)
    assert run.report.measured_peak_bytes >= probed.peak_bytes
    usual = statistics.median(e.seconds for e in run.report.steps[4:]) / run.plan.gradient_accumulation_steps
    print(f"a micro-batch took {usual:.4f} s, the probe said {probed.seconds:.4f} s")
    assert probed.seconds == pytest.approx(usual, rel=0.5)
    # Its cache and its graphs went back to the card.
    assert segments and not [s for s in segments if s["segment_pool_id"] != (0, 0)], "a graph's pool is left"
    assert not [s for s in segments if not s["allocated_size"]], "memory that nothing lies in was not given back"


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_card_that_is_smaller_is_met_before_the_first_step(dtype: str, medium_folder: Path, tmp_path: Path) -> None:
    before = allocated()
    whole = train(medium_folder, tmp_path / "whole", dtype=dtype)
    peak = whole.report.measured_peak_bytes - before
    whole.free()
    observe = At(0, lambda: limit(before + 0.6 * peak))
    run = train(medium_folder, tmp_path / "run", observe, dtype=dtype)
    print([(e.step, e.phase, e.action) for e in observe.shortages])
    same(run, whole)
    assert observe.shortages and {(e.step, e.phase) for e in observe.shortages} == {(1, "probe")}


def test_a_peak_above_vram_gib_is_lowered_before_the_first_step(medium_folder: Path, tmp_path: Path) -> None:
    whole = train(medium_folder, tmp_path / "whole", ram_gib=0)
    usable = whole.report.measured_peak_bytes + 64 * MIB
    whole.free()
    held: list[torch.Tensor] = []
    # What this process holds beside the run is in no plan, and counts.
    observe = At(0, lambda: held.append(torch.empty(256 * MIB, dtype=torch.uint8, device="cuda")))
    run = train(medium_folder, tmp_path / "run", observe, ram_gib=0, vram_gib=usable / GIB)
    held.clear()
    print([(e.step, e.phase, e.asked_bytes, e.action) for e in observe.shortages])
    same(run, whole)
    assert observe.shortages and {e.phase for e in observe.shortages} == {"probe"}
    peaks = {p.phase: p.peak_bytes for p in run.report.memory.phases}
    assert peaks["step"] <= run.plan.usable_bytes < peaks["probe"]
