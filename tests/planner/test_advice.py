"""What is said when nothing fits, to the letter: what was needed, what there is, the smallest change that fits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.planner import make_plan
from tests.planner.shapes import DEVICES, MODELS, cpu, options, plan


def message(model: str, device: Any, **changes: Any) -> str:
    with pytest.raises(DoesNotFitError) as caught:
        plan(model, device, **changes)
    return str(caught.value)


def test_too_long() -> None:
    assert message("8B", "laptop", tokens=131072) == (
        "8B needs 16.8 GiB and RTX 4060 Laptop has 7.1 GiB usable\n"
        "  most of it: activations 10.7 GiB, weights 5.3 GiB, optimizer 0.31 GiB\n"
        "  it fits with max_length = 7680 (1 recompute · 31 offload)"
    )
    assert plan("8B", "laptop", tokens=7680).micro_batch_size == 1
    assert message("8B", "laptop", tokens=7936).endswith("it fits with max_length = 7680 (1 recompute · 31 offload)")


def test_too_long_for_a_host_without_memory() -> None:
    assert message("8B", "laptop", tokens=131072, ram_gib=0).splitlines()[2] == (
        "  it fits with max_length = 5120 (7 recompute · 25 join)"
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
        "  most of it: weights 1.4 GiB, context 0.50 GiB, activations 0.21 GiB\n"
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
    "batch": ({BATCH: 96}, f"leave out {BATCH}", {BATCH: None}),
    "accumulation": (
        {"effective_batch_size": 96, "gradient_accumulation_steps": 1},
        "leave out gradient_accumulation_steps",
        {"gradient_accumulation_steps": None},
    ),
    "both of a batch": (
        {BATCH: 96, "gradient_accumulation_steps": 1},
        f"write effective_batch_size = 96 for {BATCH} and gradient_accumulation_steps",
        {"effective_batch_size": 96, BATCH: None, "gradient_accumulation_steps": None},
    ),
    "layers and batch": (
        {"tokens": 4096, "gradient_checkpointing": {"keep": 20}, BATCH: 24},
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
        "  it fits with max_length = 750912, one row at a time (6 recompute · 1 offload · 25 join)"
    )
    assert plan("8B", "H100", tokens=750912).layer_policies


def test_an_advised_length_is_the_longest() -> None:
    plan("8B", "laptop", tokens=7680)
    with pytest.raises(DoesNotFitError):
        plan("8B", "laptop", tokens=7680 + 64)


def packed(max_length: int) -> Any:
    """Many short rows: a long pack holds a lot of documents, and attention keeps something for each."""
    n, mean = 1000, 480
    data = DataStats(
        n_rows=n, n_sequences=math.ceil(n * mean / max_length), n_tokens=n * mean, n_supervised_tokens=n * mean,
        max_tokens=900, percentiles=(100, 300, mean, 700, 900), layout=BatchLayout.PACKED,
    )  # fmt: skip
    config = options(max_length=max_length, effective_batch_size=8)
    return make_plan(config, MODELS["8B"], DEVICES["T4"], data, output_dir="runs/run")


def test_an_advised_length_of_packs_counts_their_documents() -> None:
    with pytest.raises(DoesNotFitError, match=r"it fits with max_length = (\d+)") as caught:
        packed(131072)
    advised = int(str(caught.value).partition("max_length = ")[2].split()[0])
    assert advised > 16384 and packed(advised).micro_batch_size == 1
