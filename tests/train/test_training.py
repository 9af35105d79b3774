"""Whole runs on a tiny model with the real SFTTrainer: the loss is the right one, and the same every time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import ConfigError
from nbqlora.core.events import EvalEvent, PhaseEvent, PlannedEvent, SavedEvent, StepEvent
from nbqlora.core.specs import LayerPolicy
from tests import tiny
from tests.train.parts import base, evals, finetune, losses, own_loss, parts

ROWS = tiny.make_rows(12)
OTHERS = tiny.make_rows(5, seed=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("model"), initializer_range=0.2)


def adapter_bytes(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


@pytest.mark.parametrize("how", [{"lora_dropout": 0.1}, {"packing": True}], ids=str)
def test_the_same_seed_gives_the_same_bits(model: Path, tmp_path: Path, how: dict[str, Any]) -> None:
    first = finetune(model, ROWS, tmp_path / "1", max_steps=4, **how)
    second = finetune(model, ROWS, tmp_path / "2", max_steps=4, **how)
    assert len(losses(first)) == 4 and losses(first) == losses(second)
    assert adapter_bytes(first.adapter_dir) == adapter_bytes(second.adapter_dir)
    assert losses(first)[-1] < losses(first)[0] - 0.1
    other = finetune(model, ROWS, tmp_path / "3", max_steps=4, seed=7, **how)
    assert losses(other) != losses(first)


def test_the_global_state_of_random_numbers_does_not_matter(model: Path, tmp_path: Path) -> None:
    first = finetune(model, ROWS, tmp_path / "1", max_steps=2, lora_dropout=0.1)
    torch.rand(1000)
    assert losses(finetune(model, ROWS, tmp_path / "2", max_steps=2, lora_dropout=0.1)) == losses(first)


SPLITS = [(8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize("rows,accumulation", SPLITS)
def test_a_step_is_the_mean_over_all_its_tokens(model: Path, tmp_path: Path, rows: int, accumulation: int) -> None:
    run = finetune(
        model,
        ROWS[:8],
        tmp_path,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=accumulation,
        effective_batch_size=8,
        max_steps=1,
    )
    # A fresh adapter changes nothing: the first step's loss is the base model's.
    expected, _ = own_loss(base(model), ROWS[:8])
    assert losses(run) == [pytest.approx(expected, rel=1e-6)]
    assert run.report.steps[0].n_tokens == run.plan.data.n_tokens


def test_four_times_one_row_is_four_rows_at_once(model: Path, tmp_path: Path) -> None:
    many, once = (
        finetune(model, ROWS, tmp_path / str(rows), per_device_train_batch_size=rows, max_steps=4) for rows in (1, 4)
    )
    assert (many.plan.gradient_accumulation_steps, once.plan.gradient_accumulation_steps) == (4, 1)
    assert losses(many) == pytest.approx(losses(once), rel=1e-5)
    assert [e.grad_norm for e in many.report.steps] == pytest.approx([e.grad_norm for e in once.report.steps], rel=1e-4)


def test_the_last_step_of_an_epoch_may_be_smaller(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS[:5], tmp_path, per_device_train_batch_size=1, learning_rate=1e-9)
    assert len(losses(run)) == run.plan.total_steps == 2
    # Which row came last is the sampler's; it tells by its loss, and the others are the first step.
    means = [own_loss(base(model), [row]) for row in ROWS[:5]]
    ((last, n),) = ((mean, n) for mean, n in means if mean == pytest.approx(losses(run)[1], rel=1e-5))
    total, count = sum(mean * n for mean, n in means), sum(n for _, n in means)
    assert losses(run)[0] == pytest.approx((total - last * n) / (count - n), rel=1e-5)


def test_packed_rows_give_the_loss_of_unpacked_rows(model: Path, tmp_path: Path) -> None:
    unpacked = finetune(model, ROWS, tmp_path / "1", effective_batch_size=12, max_steps=2)
    packs = finetune(model, ROWS, tmp_path / "2", packing=True, effective_batch_size=12, max_steps=2)
    assert 1 < packs.plan.data.n_sequences < 12
    assert losses(packs) == pytest.approx(losses(unpacked), rel=1e-5)
    assert losses(packs)[0] == pytest.approx(own_loss(base(model), ROWS)[0], rel=1e-6)
    assert packs.report.steps[0].n_tokens == unpacked.report.steps[0].n_tokens == packs.plan.data.n_tokens


@pytest.mark.parametrize("packing", [False, True])
def test_the_eval_loss_is_the_mean_over_all_tokens(model: Path, tmp_path: Path, packing: bool) -> None:
    run = finetune(model, ROWS, tmp_path, eval_data=OTHERS, per_device_train_batch_size=2, max_steps=2, packing=packing)
    before, after = evals(run)
    assert before == pytest.approx(own_loss(base(model), OTHERS)[0], rel=1e-6)
    assert after == pytest.approx(own_loss(base(model, run.adapter_dir), OTHERS)[0], rel=1e-6)
    assert after < before


@pytest.mark.parametrize("asked", ["full", {"keep": 1}], ids=str)
def test_what_layers_keep_changes_no_bit(model: Path, tmp_path: Path, asked: Any) -> None:
    how = {"max_steps": 3, "lora_dropout": 0.1}
    everything = finetune(model, ROWS, tmp_path / "1", gradient_checkpointing="none", **how)
    run = finetune(model, ROWS, tmp_path / "2", gradient_checkpointing=asked, **how)
    assert LayerPolicy.RECOMPUTE in run.plan.layer_policies
    assert losses(run) == losses(everything)
    assert (
        adapter_bytes(run.adapter_dir)["adapter_model.safetensors"]
        == (adapter_bytes(everything.adapter_dir)["adapter_model.safetensors"])
    )


def test_a_run_tells_everything_in_order(model: Path, tmp_path: Path) -> None:
    seen: list[Any] = []
    run = finetune(model, ROWS, tmp_path, eval_data=OTHERS, num_train_epochs=1, observe=seen.append)
    assert run.status == "done" and run.report.reason == ""
    told = [e for e in seen if isinstance(e, (PhaseEvent, PlannedEvent, StepEvent, EvalEvent, SavedEvent))]
    names = [e.phase if isinstance(e, PhaseEvent) else type(e).__name__ for e in told]
    assert names == [
        "look", "PlannedEvent", "load", "train", "EvalEvent", *["StepEvent"] * 3, "EvalEvent",
        "SavedEvent", "save", "SavedEvent",
    ]  # fmt: skip
    assert tuple(seen) == run.events
    assert [e.elapsed_seconds for e in seen] == sorted(e.elapsed_seconds for e in seen)
    steps = run.report.steps
    assert [(e.step, e.total_steps) for e in steps] == [(1, 3), (2, 3), (3, 3)]
    assert all(e.seconds > 0 and e.peak_bytes > 0 and e.grad_norm is not None and e.grad_norm > 0 for e in steps)
    assert sum(e.n_tokens for e in steps) == run.plan.data.n_tokens
    rate = sum(e.n_tokens for e in steps[1:]) / sum(e.seconds for e in steps[1:])
    assert run.report.tokens_per_second == pytest.approx(rate)
    made = {r.path: r for r in run.report.replacements}
    assert made["lm_head"].new == "chunked loss of supervised tokens"
    checkpoint, saved = (e for e in seen if isinstance(e, SavedEvent))
    assert checkpoint.path.endswith("step-000003")
    assert saved.step == 3 and saved.n_bytes == sum(len(b) for b in adapter_bytes(run.adapter_dir).values())
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"


def test_the_schedule_is_the_one_asked_for(model: Path, tmp_path: Path) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=4, lr_scheduler_type="linear", warmup_ratio=0.5, learning_rate=1e-3)
    assert [e.learning_rate for e in run.report.steps] == pytest.approx([0, 5e-4, 1e-3, 5e-4])


def test_the_tables_reach_trl_and_peft(model: Path, tmp_path: Path) -> None:
    tables = {"trl": {"adam_beta1": 0.8, "lr_scheduler_kwargs": {}, "data_seed": 3}, "peft": {"use_rslora": True}}
    found = parts(model, ROWS, tmp_path, **tables)
    assert found.trainer.args.adam_beta1 == 0.8 and found.trainer.args.data_seed == 3
    assert found.loaded.model.peft_config["default"].use_rslora is True
    run = finetune(model, ROWS, tmp_path, max_steps=1, **tables)
    assert json.loads((run.adapter_dir / "adapter_config.json").read_text())["use_rslora"] is True
    assert json.loads((tmp_path / "run.json").read_text())["config"]["trl"]["adam_beta1"] == 0.8


WRONG = {
    "value": ({"eval_strategy": "sometimes"}, "trl", "sometimes is not a valid IntervalStrategy"),
    "type": ({"weight_decay_of": 1}, "trl.weight_decay_of", "unknown key"),
    "no data": ({"eval_strategy": "epoch"}, "trl.eval_strategy", "there is nothing to evaluate on; give eval_data"),
}


@pytest.mark.parametrize("trl,key,message", WRONG.values(), ids=WRONG)
def test_what_trl_refuses_is_a_mistake_of_the_options(
    model: Path, tmp_path: Path, trl: dict[str, Any], key: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        finetune(model, ROWS, tmp_path, trl=trl)
    (problem,) = caught.value.problems
    assert problem.key == key and problem.message.startswith(message)


@pytest.mark.parametrize("trl", [{"logging_steps": 50}, {"logging_strategy": "no"}, {"logging_strategy": "epoch"}])
def test_every_step_is_an_event_whatever_is_logged(model: Path, tmp_path: Path, trl: dict[str, Any]) -> None:
    run = finetune(model, ROWS, tmp_path, max_steps=4, trl=trl)
    assert [e.step for e in run.report.steps] == [1, 2, 3, 4]
    assert run.adapter_dir.is_dir()


def test_nothing_but_ours_is_saved_or_printed(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    finetune(model, ROWS, tmp_path / "warm", max_steps=1)
    capfd.readouterr()
    finetune(model, ROWS, tmp_path / "out", max_steps=2, eval_data=OTHERS)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"adapter", "checkpoints", "run.json"}


def test_half_precision_follows_fp32_in_one_process(model: Path, tmp_path: Path) -> None:
    full = finetune(model, ROWS, tmp_path / "1", max_steps=3)
    half = finetune(model, ROWS, tmp_path / "2", max_steps=3, dtype="bf16")
    again = finetune(model, ROWS, tmp_path / "3", max_steps=3)
    assert half.plan.dtype == "bf16" and losses(half) == pytest.approx(losses(full), rel=0.02)
    assert losses(half) != losses(full) == losses(again)
