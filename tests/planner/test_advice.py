"""What is said when nothing fits, to the letter: what was needed, what there is, the smallest change that fits."""

from __future__ import annotations

from typing import Any

import pytest

from nbqlora.core.errors import DoesNotFitError
from tests.planner.shapes import cpu, plan


def message(model: str, device: Any, **changes: Any) -> str:
    with pytest.raises(DoesNotFitError) as caught:
        plan(model, device, **changes)
    return str(caught.value)


def test_too_long() -> None:
    assert message("8B", "laptop", tokens=131072) == (
        "8B needs 26.5 GiB and RTX 4060 Laptop has 7.1 GiB usable\n"
        "  most of it: activations 20.3 GiB, weights 5.3 GiB, optimizer 0.31 GiB\n"
        "  it fits with max_length = 7168 (2 recompute · 30 offload)"
    )
    assert plan("8B", "laptop", tokens=7168).micro_batch_size == 1
    assert message("8B", "laptop", tokens=7200).endswith("it fits with max_length = 7168 (2 recompute · 30 offload)")


def test_too_long_for_a_host_without_memory() -> None:
    assert message("8B", "laptop", tokens=131072, ram_gib=0).splitlines()[2] == (
        "  it fits with max_length = 5120 (8 recompute · 24 join)"
    )
    assert plan("8B", "laptop", tokens=5120, ram_gib=0).host_bytes == 0
    assert message("8B", "laptop", tokens=6400, ram_gib=0).splitlines()[2] == "  it fits when you leave out ram_gib"


def test_too_long_for_stock_layers() -> None:
    assert message("stock 8B", "laptop", tokens=16384) == (
        "stock 8B needs 10.3 GiB and RTX 4060 Laptop has 7.1 GiB usable\n"
        "  most of it: weights 5.3 GiB, activations 4.3 GiB, optimizer 0.31 GiB\n"
        "  it fits with max_length = 3712 (32 offload)"
    )
    assert plan("stock 8B", "laptop", tokens=3712).micro_batch_size == 1


def test_too_large() -> None:
    assert message("70B", "T4") == (
        "70B needs 41.0 GiB and Tesla T4 has 13.8 GiB usable\n"
        "  most of it: weights 36.8 GiB, optimizer 1.5 GiB, adapter 1.2 GiB\n"
        "  no max_length fits: 40.7 GiB are needed before the first token; a smaller model does"
    )


def test_ones_own_limit() -> None:
    assert message("8B", "H100", vram_gib=6) == (
        "8B needs 6.3 GiB and H100 has 6.0 GiB usable\n"
        "  most of it: weights 5.3 GiB, optimizer 0.31 GiB, adapter 0.23 GiB\n"
        "  no max_length fits: 6.2 GiB are needed before the first token; a smaller model does\n"
        "  vram_gib = 6 is your own limit"
    )
    assert "your own limit" not in message("70B", "T4", vram_gib=80)


def test_on_a_cpu_the_process_is_part_of_what_is_needed() -> None:
    assert message("1B", cpu(2)) == (
        "1B needs 2.4 GiB and 2 CPU cores has 1.5 GiB usable\n"
        "  most of it: weights 1.4 GiB, context 0.50 GiB, activations 0.22 GiB\n"
        "  no max_length fits: 2.2 GiB are needed before the first token; a smaller model does"
    )


@pytest.mark.parametrize("changes,allowed", [({}, "6.0 GiB"), ({"ram_gib": 1}, "1.0 GiB")])
def test_too_little_memory_of_the_host(changes: dict[str, Any], allowed: str) -> None:
    assert message("8B", "H100", tokens=32768, gradient_checkpointing="offload", **changes) == (
        f"the inputs of 32 layers need 8.0 GiB of host memory, and {allowed} may be taken (ram_gib)\n"
        '  it fits when you write gradient_checkpointing = "auto"'
    )
    assert plan("8B", "H100", tokens=32768, **changes).host_bytes <= 6 << 30


AUTO, BATCH = {"gradient_checkpointing": "auto"}, "per_device_train_batch_size"
UNPIN = {
    "layers": (
        {"tokens": 4096, "gradient_checkpointing": "none"},
        'write gradient_checkpointing = "auto"',
        AUTO,
    ),
    "batch": ({BATCH: 64}, f"leave out {BATCH}", {BATCH: None}),
    "accumulation": (
        {"effective_batch_size": 64, "gradient_accumulation_steps": 1},
        "leave out gradient_accumulation_steps",
        {"gradient_accumulation_steps": None},
    ),
    "both of a batch": (
        {BATCH: 64, "gradient_accumulation_steps": 1},
        f"write effective_batch_size = 64 for {BATCH} and gradient_accumulation_steps",
        {"effective_batch_size": 64, BATCH: None, "gradient_accumulation_steps": None},
    ),
    "layers and batch": (
        {"tokens": 4096, "gradient_checkpointing": {"keep": 20}, BATCH: 16},
        f'write gradient_checkpointing = "auto" and leave out {BATCH}',
        {**AUTO, BATCH: None},
    ),
    "16 bits": ({"load_in_4bit": False, "gradient_checkpointing": "full"}, "write load_in_4bit = true", {}),
}


@pytest.mark.parametrize("changes,advice,followed", UNPIN.values(), ids=UNPIN)
def test_what_is_pinned_is_named_first_and_the_advice_holds(
    changes: dict[str, Any], advice: str, followed: dict[str, Any]
) -> None:
    assert message("8B", "T4", **changes).splitlines()[2] == f"  it fits when you {advice}"
    plan("8B", "T4", **{**changes, **followed, "load_in_4bit": True})


def test_a_pinned_batch_that_is_too_long_as_well() -> None:
    assert message("8B", "H100", tokens=1048576, per_device_train_batch_size=2).splitlines()[2] == (
        "  it fits with max_length = 427008, one row at a time (7 recompute · 1 offload · 24 join)"
    )
    assert plan("8B", "H100", tokens=427008).layer_policies


def test_an_advised_length_is_the_longest() -> None:
    plan("8B", "laptop", tokens=7168)
    with pytest.raises(DoesNotFitError):
        plan("8B", "laptop", tokens=7168 + 64)
