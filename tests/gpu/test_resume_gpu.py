"""Stop and resume on a card: the same steps, within what the card's own arithmetic varies by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import nbqlora
from nbqlora.core.events import StepEvent
from tests import tiny

pytestmark = pytest.mark.gpu
OPTIONS: dict[str, Any] = {
    "max_length": 96, "effective_batch_size": 4, "per_device_train_batch_size": 2, "num_train_epochs": 3, "lora_r": 4,
    "learning_rate": 1e-2, "lora_dropout": 0.1, "save_minutes": 1e-9,
}  # fmt: skip
TOTAL, STOP_AFTER = 9, 4


class StopAfter:
    """Breaks the run off when a step is told, as a lost session would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == self.step + 1:
            raise ConnectionResetError("the session was lost")


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packs"])
@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_8bit"])
def test_a_lost_run_goes_on_with_the_same_losses(dtype, packing, optim, tiny_folder, tmp_path):
    rows = tiny.make_rows(12) if not packing else tiny.make_rows(24)
    options = {**OPTIONS, "dtype": dtype, "packing": packing, "optim": optim, "model": str(tiny_folder), "data": rows}
    if packing:
        options |= {"max_steps": TOTAL, "effective_batch_size": 2, "per_device_train_batch_size": 1}
    whole = nbqlora.finetune(**options, output_dir=str(tmp_path / "whole"))
    with pytest.raises(ConnectionResetError):
        nbqlora.finetune(**options, output_dir=str(tmp_path / "parts"), observe=StopAfter(STOP_AFTER))
    parts = nbqlora.finetune(**options, output_dir=str(tmp_path / "parts"), resume=True)
    assert len(whole.report.steps) == len(parts.report.steps) == TOTAL
    apart = [abs(a.loss - b.loss) for a, b in zip(whole.report.steps, parts.report.steps, strict=True)]
    print(f"{dtype} packing={packing} {optim}: losses differ by at most {max(apart):.2e}")
    # Dropout comes from the card's own generator: a state that was not restored differs in the second digit.
    assert max(apart) <= (2e-3 if dtype == "bf16" else 5e-4)


def test_a_checkpoint_takes_no_more_of_the_card(medium_folder, tmp_path):
    peaks = []
    for minutes in (0, 1e-9):
        torch.cuda.empty_cache()
        run = nbqlora.finetune(
            model=str(medium_folder), data=tiny.make_rows(16), max_length=96, max_steps=4, effective_batch_size=4,
            lora_r=8, save_minutes=minutes, output_dir=str(tmp_path / str(minutes)),
        )  # fmt: skip
        peaks.append(run.report.measured_peak_bytes)
        run.free()
    assert peaks[1] - peaks[0] <= 1 << 20


def test_the_loaded_model_is_probed_on_the_card(tiny_folder, tmp_path):
    run = nbqlora.finetune(
        model=str(tiny_folder), data=tiny.make_rows(24), max_length=96, max_steps=2, effective_batch_size=2,
        output_dir=str(tmp_path),
    )  # fmt: skip
    assert run.plan.data.layout.value == "packed", run.plan.data.layout_because
