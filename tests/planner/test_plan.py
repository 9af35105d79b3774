"""Whole plans for machines and models that are not here: they fit, they are no slower with more, they say why."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from nbqlora.core.errors import ConfigError, DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, LayerPolicy, MemoryCategory
from nbqlora.planner import make_plan, total_steps, usable_bytes
from nbqlora.planner.estimate import budget
from nbqlora.planner.search import candidates
from tests.planner.shapes import DEVICES, GIB, MODELS, card, cpu, options, plan, rows_of

KEEP, RECOMPUTE = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE
FIT = {
    "T4": {"1B", "3B", "8B", "13B"},
    "H100": {"1B", "3B", "8B", "13B", "70B"},
    "laptop": {"1B", "3B", "8B"},
    "CPU": set(),
}


def kept(found: Plan) -> int:
    return sum(p is KEEP for p in found.layer_policies)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS)
def test_a_plan_fits_or_says_that_none_does(model: str, device: str) -> None:
    if model not in FIT[device]:
        with pytest.raises(DoesNotFitError):
            plan(model, device)
        return
    found = plan(model, device)
    assert found.predicted_peak_bytes <= found.usable_bytes == usable_bytes(options(), DEVICES[device])
    assert len(found.layer_policies) == MODELS[model].n_layers
    assert found.layer_policies == tuple(sorted(found.layer_policies, key=lambda p: p is KEEP))
    assert found.effective_batch_size == 16
    assert found.dtype == {"T4": "fp16", "CPU": "fp32"}.get(device, "bf16")


def test_no_faster_plan_would_have_fitted() -> None:
    config, data = options(), rows_of()
    found = plan("8B", "T4")
    for other in candidates(config, MODELS["8B"], DEVICES["T4"], data, "fp16"):
        if other.budget.total_bytes <= found.usable_bytes:
            assert other.step_seconds is not None and found.step_seconds is not None
            assert round(found.step_seconds, 4) <= round(other.step_seconds, 4)


@pytest.mark.parametrize("flops", [2.5e13, None])
@pytest.mark.parametrize("model", ["1B", "8B", "13B"])
def test_more_memory_never_makes_a_plan_slower(model: str, flops: float | None) -> None:
    before: tuple[float, int] = (math.inf, MODELS[model].n_layers)
    for gib in (10, 11, 12, 14, 16, 20, 24, 32, 40, 48, 80, 160, 400):
        try:
            found = plan(model, card("card", gib, bf16=True, flops=flops))
        except DoesNotFitError:
            assert math.isinf(before[0]) and gib < 16
            continue
        recomputed = len(found.layer_policies) - kept(found)
        now = (0.0 if found.step_seconds is None else found.step_seconds, recomputed)
        assert now[0] <= before[0] + 1e-4 and (flops is not None or recomputed <= before[1])
        before = now
    assert before[1] == 0  # 400 GiB keep everything


def peak(
    model: str = "8B",
    *,
    rows: int = 2,
    tokens: int = 1024,
    keep: int = 8,
    layout: BatchLayout = BatchLayout.PADDED,
    **changes: Any,
) -> int:
    config = options(max_length=tokens, **changes)
    parts = (config, MODELS[model], DEVICES["H100"], "bf16", rows, tokens, rows * tokens, keep)
    return budget(*parts, layout=layout).total_bytes


@pytest.mark.parametrize(
    "how", [{}, {"layout": BatchLayout.PACKED}, {"lora_dropout": 0.05}, {"optim": "adamw_8bit"}], ids=str
)
def test_more_tokens_rank_rows_or_kept_layers_take_more(how: dict[str, Any]) -> None:
    lengths = [peak(tokens=n, **how) for n in (64, 128, 512, 1000, 1024, 4096, 16384)]
    ranks = [peak(lora_r=r, **how) for r in (1, 8, 16, 64, 256)]
    rows = [peak(rows=n, **how) for n in (1, 2, 3, 8)]
    keeps = [peak(keep=n, **how) for n in range(1, 33)]
    for series in (lengths, ranks, rows, keeps):
        assert series == sorted(series) and len(set(series)) == len(series)
    assert peak(keep=0, **how) <= peak(keep=2, **how)


@pytest.mark.parametrize("layout", [BatchLayout.PACKED, BatchLayout.JOINED])
def test_what_lies_end_to_end_attends_over_the_whole_batch(layout: BatchLayout) -> None:
    # A mask of (2 x 4096)**2 in place of 2 x 4096**2, once as bool and in each of 32 layers in two bytes.
    assert peak(tokens=4096, keep=32, layout=layout) - peak(tokens=4096, keep=32) == 2 * 4096**2 * (1 + 32 * 2)


def test_one_row_at_a_time_needs_no_mask_but_one_pack_does() -> None:
    alone, joined, packed = (peak(rows=1, layout=which) for which in reversed(BatchLayout))
    assert alone == joined < packed


def test_dropout_is_counted() -> None:
    # Each of the seven adapters keeps its own input (5d + a + f) and a bool mask, where two were shared.
    d, f, tokens = 4096, 14336, 2048
    extra = (5 * d + d + f) * 3 - (2 * d + f) * 2
    assert peak(keep=32, lora_dropout=0.05) - peak(keep=32) == 32 * tokens * extra


@pytest.mark.parametrize("gib", [7, 9, 12])
def test_vram_gib_is_a_limit(gib: float) -> None:
    found = plan("8B", "H100", vram_gib=gib)
    assert found.usable_bytes == int(gib * GIB) >= found.predicted_peak_bytes
    assert {d.name: d.because for d in found.decisions}["memory"] == "pinned by vram_gib"


def test_vram_gib_takes_the_reserve_but_not_what_is_not_there() -> None:
    t4 = DEVICES["T4"]
    assert usable_bytes(options(vram_gib=14.2), t4) == int(14.2 * GIB) > usable_bytes(options(), t4)
    assert usable_bytes(options(vram_gib=80), t4) == t4.free_bytes
    found = plan("8B", "T4", vram_gib=80)
    assert found.predicted_peak_bytes <= t4.free_bytes
    (because,) = (d.because for d in found.decisions if d.name == "memory")
    assert because == "all that is free; vram_gib = 80 is more"


def test_on_a_cpu_the_process_itself_counts() -> None:
    device = cpu(8, held_gib=1.5)
    found = plan("1B", device, tokens=128)
    assert found.usable_bytes == int(7.5 * GIB)
    assert found.budget.by_category[MemoryCategory.CONTEXT] == device.context_bytes
    assert plan("1B", device, tokens=128, vram_gib=6).usable_bytes == 6 * GIB


@pytest.mark.parametrize("effective", [1, 2, 3, 7, 12, 16, 60, 97, 128])
def test_every_split_keeps_the_effective_batch(effective: int) -> None:
    config = options(effective_batch_size=effective)
    found = candidates(config, MODELS["8B"], DEVICES["T4"], rows_of(), "fp16")
    splits = {(x.micro_batch_size, x.accumulation) for x in found}
    assert splits == {(n, effective // n) for n in range(1, effective + 1) if effective % n == 0}
    assert plan("1B", "H100", effective_batch_size=effective).effective_batch_size == effective


PINNED = {
    "batch": ({"per_device_train_batch_size": 3}, (3, 5)),
    "accumulation": ({"gradient_accumulation_steps": 4}, (4, 4)),
    "both": ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 5}, (2, 5)),
    "batch and effective": ({"per_device_train_batch_size": 2, "effective_batch_size": 10}, (2, 5)),
    "accumulation and effective": ({"gradient_accumulation_steps": 5, "effective_batch_size": 10}, (2, 5)),
    "a large batch": ({"per_device_train_batch_size": 40}, (40, 1)),
}


@pytest.mark.parametrize("changes,expected", PINNED.values(), ids=PINNED)
def test_a_pinned_batch_is_kept(changes: dict[str, int], expected: tuple[int, int]) -> None:
    found = plan("1B", "H100", tokens=256, **changes)
    assert (found.micro_batch_size, found.gradient_accumulation_steps) == expected
    assert {d.name: d.because for d in found.decisions}["batch"] == "pinned"


LAYERS = {
    "none": ("none", 32), "false": (False, 32), "full": ("full", 0), "true": (True, 0),
    "both": ({"keep": 22, "recompute": 10}, 22), "keep": ({"keep": 5}, 5), "recompute": ({"recompute": 5}, 27),
    "all": ({"keep": 32}, 32), "no layer": ({"keep": 0}, 0), "zero": ({"keep": 32, "recompute": 0}, 32),
}  # fmt: skip


@pytest.mark.parametrize("asked,expected", LAYERS.values(), ids=LAYERS)
def test_pinned_layers_are_kept(asked: Any, expected: int) -> None:
    found = plan("8B", "H100", gradient_checkpointing=asked)
    assert found.layer_policies == (RECOMPUTE,) * (32 - expected) + (KEEP,) * expected
    assert {d.name: d.because for d in found.decisions}["layers"] == "pinned by gradient_checkpointing"


WRONG = {
    "too few": ({"keep": 22, "recompute": 4}, "22 keep + 4 recompute = 26", "one of the two numbers is enough"),
    "too many": ({"recompute": 30, "keep": 4}, "30 recompute + 4 keep = 34", "one of the two numbers is enough"),
    "keep": ({"keep": 33}, "33 keep", "at most 32"),
    "recompute": ({"recompute": 40}, "40 recompute", "at most 32"),
}


@pytest.mark.parametrize("asked,given,hint", WRONG.values(), ids=WRONG)
def test_layers_that_do_not_add_up(asked: dict[str, int], given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan("8B", "H100", gradient_checkpointing=asked)
    (problem,) = caught.value.problems
    assert (problem.key, problem.hint) == ("gradient_checkpointing", hint)
    assert problem.message == f"{given}, but this model has 32 layers"


STEPS = [(1000, 3, 5, 1.0), (1000, 16, 1, 3.0), (7, 2, 4, 1.0), (3, 16, 1, 2.0), (100, 4, 4, 0.5), (33, 4, 4, 2.3)]


@pytest.mark.parametrize("n,rows,accumulation,epochs", [*STEPS, (1, 1, 1, 0.01), (17, 4, 2, 1.7)])
def test_steps_are_those_of_trainer(n: int, rows: int, accumulation: int, epochs: float, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        num_train_epochs=epochs,
        use_cpu=True,
        report_to="none",
    )
    trainer = Trainer(model=torch.nn.Linear(1, 1), args=arguments, train_dataset=list(range(n)))
    steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())[-1]
    config = options(num_train_epochs=epochs)
    assert total_steps(config, n, rows, accumulation) == steps
    assert total_steps(options(num_train_epochs=epochs, max_steps=9), n, rows, accumulation) == 9


def test_the_plan_counts_packs() -> None:
    data = replace(rows_of(1024, n=1000, packs=100), layout=BatchLayout.PACKED)
    found = make_plan(options(effective_batch_size=16), MODELS["1B"], DEVICES["H100"], data, output_dir="out")
    assert found.total_steps == 7


def test_packing_does_not_change_how_often_a_run_learns() -> None:
    data = replace(rows_of(1024, n=1000, packs=125), layout=BatchLayout.PACKED)
    found = make_plan(options(), MODELS["1B"], DEVICES["H100"], data, output_dir="out")
    assert (found.effective_batch_size, found.total_steps) == (2, 63)  # 2 packs hold the 16 rows of a step
    alone = replace(rows_of(1024, n=1000, packs=1000), layout=BatchLayout.PACKED)
    assert make_plan(options(), MODELS["1B"], DEVICES["H100"], alone, output_dir="out").effective_batch_size == 16


@pytest.mark.parametrize("effective", [16, 720])
def test_a_plan_takes_less_than_a_second(effective: int) -> None:
    begun = time.perf_counter()
    plan("70B", "H100", effective_batch_size=effective)
    assert time.perf_counter() - begun < 1


def test_a_plan_that_does_not_fit_takes_less_than_a_second() -> None:
    begun = time.perf_counter()
    with pytest.raises(DoesNotFitError):
        plan("70B", "T4", tokens=131072, effective_batch_size=256, gradient_checkpointing="none")
    assert time.perf_counter() - begun < 1


def test_the_published_anchor() -> None:
    # HF + PEFT with checkpointing peaked at 13.52 GiB on an H100, all logits made (2 x 2048 x 128,256); ours are not.
    changes = {"per_device_train_batch_size": 2, "gradient_checkpointing": "full", "optim": "adamw_8bit"}
    found = plan("8B", "H100", tokens=2048, **changes)
    assert 6.5 * GIB < found.predicted_peak_bytes < 11 * GIB
    weights = found.budget.by_category[MemoryCategory.WEIGHTS]
    assert weights == pytest.approx(5.31 * GIB, rel=0.01)


def test_a_plan_says_why() -> None:
    found = plan("8B", "T4", tokens=4096)
    because = {d.name: (d.value, d.because) for d in found.decisions}
    assert because["dtype"] == ("fp16", "this card has no bf16")
    assert because["batch"][0] == (
        f"{found.micro_batch_size} row{'s' if found.micro_batch_size > 1 else ''} at once, "
        f"accumulation {found.gradient_accumulation_steps}"
    )
    assert because["layers"][1].startswith("one more layer kept would be ")
    assert because["memory"] == ("13.8 GiB usable", "context 0.40 GiB, reserve 0.50 GiB for fragmentation")
    roomy = {d.name: d.because for d in plan("1B", "H100", tokens=256).decisions}
    assert roomy["layers"] == "everything fits, so nothing is computed twice"
    assert {d.name: d.because for d in plan("8B", "T4", dtype="fp32", tokens=256).decisions}["dtype"] == (
        "pinned by dtype"
    )
