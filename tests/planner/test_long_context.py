"""8B in fp16 with r = 32 on 14.74 GiB and 10 GiB of RAM: 65,536 tokens, then 98,304; and what a plan says of it."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, DataStats, DeviceSpec, MemoryCategory
from nbqlora.engine.micro_step import CAPTURED_TOKENS, not_captured_because
from nbqlora.planner import batch, make_plan
from nbqlora.planner.embedding import embedding_bytes, inputs_bytes, may_be_on_host
from nbqlora.planner.search import split_of
from tests.planner.shapes import DEVICES, GIB, MODELS, options

FREE_GIB, RAM_GIB = 14.74, 10
ON_HOST = "the embedding is looked up in host memory"
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
    "device,tokens,limit", [("T4", 65536, None), ("H100", 65536, None), ("T4", 98304, 13.4), ("H100", 98304, None)]
)
def test_the_goal(device: str, tokens: int, limit: float | None) -> None:
    found = planned(tokens, device, vram_gib=limit)
    assert found.micro_batch_size == 1 and found.most_tokens == tokens
    assert found.predicted_peak_bytes <= found.usable_bytes <= FREE_GIB * GIB
    assert found.host_bytes + found.offload_embedding * embedding_bytes(found.model, 2) <= RAM_GIB * GIB
    said = {d.name: (d.value, d.because) for d in found.decisions}
    assert said["step"] == ("eager", ON_HOST if found.offload_embedding else LONG)
    assert found.offload_embedding == ("embedding" in said) == (tokens > 65536)
    assert said["attention"][0].endswith(f"; backward in {8 if tokens > 65536 else 4} groups of heads")


def test_the_embedding_is_on_the_card_where_that_fits_or_another_part_needs_it() -> None:
    assert planned(98304, vram_gib=14.7).offload_embedding is False
    lean: dict[str, Any] = {"vram_gib": 13.4}
    on_host = planned(98304, **lean)
    assert on_host.offload_embedding and not on_host.model.embedding_on_host
    weights = planned(65536, **lean).budget.by_category[MemoryCategory.WEIGHTS]
    size = embedding_bytes(on_host.model, 2)
    assert on_host.budget.by_category[MemoryCategory.WEIGHTS] == weights - size == weights - 128256 * 4096 * 2
    said = {d.name: d for d in on_host.decisions}["embedding"]
    assert said.value == "0.98 GiB in host memory" and said.because.startswith("nothing fits with its 0.98 GiB on the")
    config = options(max_length=98304, lora_r=32, dtype="fp16", ram_gib=RAM_GIB)
    assert inputs_bytes(config, on_host) == RAM_GIB * GIB - size > on_host.host_bytes
    assert inputs_bytes(config, planned(65536)) == RAM_GIB * GIB
    for trained in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [1]}):
        with pytest.raises(DoesNotFitError):
            planned(98304, **lean, peft=trained)
    assert not may_be_on_host(options(), MODELS["1B"], DEVICES["T4"], 98304), "tied: the head's matrix too"
    assert not may_be_on_host(options(), MODELS["8B"], DEVICES["T4"], CAPTURED_TOKENS), "short rows are captured"
    assert may_be_on_host(options(), MODELS["8B"], DEVICES["T4"], CAPTURED_TOKENS + 1)


def test_a_step_with_the_embedding_on_the_host_takes_longer() -> None:
    there = replace(MODELS["8B"], embedding_on_host=True)
    data = DataStats.full(4, 98304, layout=BatchLayout.PADDED)
    config = options(max_length=98304, lora_r=32, dtype="fp16", ram_gib=RAM_GIB, vram_gib=14.7)
    split = [split_of(config, model, free("T4"), data, "fp16", 1, 1) for model in (MODELS["8B"], there)]
    paces = [x.pace.kept for x in split]
    assert paces[1] - paces[0] == pytest.approx(98304 * 4096 * 2 / 12e9, rel=0.1)  # less a graph's gaps


def test_beyond_it_is_said_what_fits() -> None:
    with pytest.raises(DoesNotFitError, match=r"it fits with max_length = \d+"):
        planned(131072)


def test_long_rows_are_launched_kernel_by_kernel_in_the_engine_too() -> None:
    assert CAPTURED_TOKENS == batch.CAPTURED_TOKENS
    engine: Any = SimpleNamespace(complete=True, last_norm=object(), layers={}, shards=None)
    for tokens, because in ((CAPTURED_TOKENS, ""), (CAPTURED_TOKENS + 1, LONG)):
        found = not_captured_because(engine, torch.device("cuda"), lambda model, batch: None, row_tokens=tokens)  # type: ignore[arg-type,return-value]
        assert found == because
        found = not_captured_because(  # type: ignore[arg-type,return-value]
            engine, torch.device("cuda"), lambda model, batch: None, row_tokens=tokens, embedding_on_host=True
        )
        assert found == ON_HOST


def test_many_short_rows_are_captured_still() -> None:
    config = options(max_length=1024, per_device_train_batch_size=32, gradient_accumulation_steps=1)
    rows = DataStats.full(64, 1024, layout=BatchLayout.PADDED)
    found = make_plan(config, MODELS["1B"], DEVICES["H100"], rows, output_dir="out")
    assert {d.name: d.value for d in found.decisions}["step"] == "captured as a CUDA graph"
