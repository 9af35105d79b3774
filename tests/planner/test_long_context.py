"""8B in fp16 with r = 32 on 14.74 GiB and 10 GiB of RAM: 65,536 tokens, then 98,304; and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec
from nbqlora.engine.micro_step import CAPTURED_TOKENS, not_captured_because
from nbqlora.planner import batch, make_plan
from tests.planner.shapes import DEVICES, GIB, MODELS, options

FREE_GIB, RAM_GIB = 14.74, 10
LONG = "rows of more than 16,384 tokens keep the card busy, and graphs would hold memory"


def free(device: str) -> DeviceSpec:
    """So much of a card as another process leaves."""
    return replace(DEVICES[device], free_bytes=int(FREE_GIB * GIB), host_free_bytes=48 * GIB)


def planned(tokens: int, device: str = "T4", **changes: Any) -> Plan:
    config = options(
        max_length=tokens, lora_r=32, dtype="fp16", ram_gib=RAM_GIB, per_device_train_batch_size=1,
        gradient_accumulation_steps=1, **changes,
    )  # fmt: skip
    data = DataStats.full(4, tokens, layout=BatchLayout.PADDED)
    return make_plan(config, MODELS["8B"], free(device), data, output_dir="out")


@pytest.mark.parametrize(
    "device,tokens,limit", [("T4", 65536, None), ("H100", 65536, None), ("T4", 98304, 14.5), ("H100", 98304, 14.5)]
)
def test_the_goal(device: str, tokens: int, limit: float | None) -> None:
    # The longest takes a little of the reserve against fragmentation: half of it is left.
    found = planned(tokens, device, vram_gib=limit)
    assert found.micro_batch_size == 1 and found.most_tokens == tokens
    assert found.predicted_peak_bytes <= found.usable_bytes <= FREE_GIB * GIB
    assert found.host_bytes <= RAM_GIB * GIB
    said = {d.name: (d.value, d.because) for d in found.decisions}
    assert said["step"] == ("eager", LONG)
    assert said["attention"][0].endswith(f"; backward in {8 if tokens > 65536 else 4} groups of heads")


def test_beyond_it_is_said_what_fits() -> None:
    with pytest.raises(DoesNotFitError, match=r"it fits with max_length = \d+"):
        planned(131072)


def test_long_rows_are_launched_kernel_by_kernel_in_the_engine_too() -> None:
    assert CAPTURED_TOKENS == batch.CAPTURED_TOKENS
    engine: Any = SimpleNamespace(complete=True, last_norm=object(), layers={}, shards=None)
    for tokens, because in ((CAPTURED_TOKENS, ""), (CAPTURED_TOKENS + 1, LONG)):
        found = not_captured_because(engine, torch.device("cuda"), lambda model, batch: None, row_tokens=tokens)  # type: ignore[arg-type,return-value]
        assert found == because


def test_many_short_rows_are_captured_still() -> None:
    config = options(max_length=1024, per_device_train_batch_size=32, gradient_accumulation_steps=1)
    rows = DataStats.full(64, 1024, layout=BatchLayout.PADDED)
    found = make_plan(config, MODELS["1B"], DEVICES["H100"], rows, output_dir="out")
    assert {d.name: d.value for d in found.decisions}["step"] == "captured as a CUDA graph"
