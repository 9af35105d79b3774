"""Which run a checkpoint is of: what must agree, what may change, and how each is said."""

from __future__ import annotations

import dataclasses
import re
import shutil

import pytest
import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import RunError
from nbqlora.memory.device import device_spec
from nbqlora.run.identity import FREE_TRL, differences
from nbqlora.run.look import look
from nbqlora.run.resume import begin
from nbqlora.run.tables import table_fields
from tests import tiny
from tests.run.resuming import OPTIONS, ROWS, edit_state, finetune, plan, saved_steps

pytestmark = pytest.mark.usefixtures("quick")


def test_another_run_is_refused_with_each_difference(model, killed):
    out, rows = killed(4), tiny.make_rows(12)
    with pytest.raises(RunError) as caught:
        finetune(model, out, resume=True, data=rows, learning_rate=1e-3, trl={"adam_beta1": 0.8}, optim="adamw_torch")
    head, *lines, advice = str(caught.value).splitlines()
    assert head == f"{out} holds 4 of 9 steps of another run, so this one cannot go on from there"
    then, now = (plan(model, out, data=data).data.n_tokens for data in (ROWS, rows))
    assert lines == [
        f"  data            10 rows, {then} tokens -> 12 rows, {now} tokens; the rows differ",
        "  learning_rate   0.01 -> 0.001",
        "  optim           adamw_torch_fused -> adamw_torch",
        "  trl.adam_beta1  not set -> 0.8",
    ]
    assert advice == "  write the former values, or give this run another name"
    assert saved_steps(out) == [1, 2, 3, 4] and not (out / "run.json").exists()


OTHERS = {
    "max_length": 64, "assistant_only_loss": False, "lr_scheduler_type": "cosine", "warmup_ratio": 0.3,
    "weight_decay": 0.1, "max_grad_norm": 2.0, "lora_r": 8, "lora_alpha": 8, "lora_dropout": 0.2,
    "target_modules": ("q_proj",), "seed": 1, "load_in_4bit": False, "num_train_epochs": 4, "effective_batch_size": 2,
    "per_device_train_batch_size": 3, "max_steps": 5, "packing": True, "peft": {"use_rslora": True},
}  # fmt: skip


def test_each_option_that_decides_the_steps_is_part_of_it(model, killed, tmp_path):
    out = killed(1)
    for name, value in OTHERS.items():
        changes = {name: value, **({"padding_free": None} if name == "packing" else {})}
        changes |= {"effective_batch_size": None} if name.startswith("per_device") else {}
        with pytest.raises(RunError) as caught:
            finetune(model, out, resume=True, **changes)
        keys = [line.split()[0] for line in str(caught.value).splitlines()[1:-1]]
        told = {"per_device_train_batch_size": "effective_batch_size", "peft": "peft.use_rslora"}.get(name, name)
        assert told in keys, name


def test_another_model_is_refused_and_the_same_files_elsewhere_are_not(model, killed, tmp_path):
    other = tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"model  .*model\d \(\S+ parameters\) -> .*other \(\S+ parameters\)"):
        finetune(other, killed(1), resume=True)
    moved = shutil.copytree(model, tmp_path / "moved")
    run = finetune(moved, killed(2), resume=True, max_minutes=1e-9)
    assert [e.step for e in run.report.steps] == [1, 2, 3]
    finetune(moved, tmp_path / "out", max_minutes=1e-9)
    shutil.copy(other / "model.safetensors", moved)
    with pytest.raises(RunError, match="moved: its files changed"):
        finetune(moved, tmp_path / "out", resume=True)


def test_a_fingerprint_counts_where_both_are_known():
    counts = {"n_rows": 10, "n_tokens": 400, "n_supervised_tokens": 100}
    one, other, unknown = ({"data": {**counts, "fingerprint": mark}} for mark in ("a", "b", ""))
    said = "data  10 rows, 400 tokens: other rows, another order, or other tokens are learned"
    assert differences(one, other) == (said,)
    assert differences(one, unknown) == differences(unknown, other) == differences(one, dict(one)) == ()
    fewer = {"data": {**counts, "n_supervised_tokens": 90, "fingerprint": ""}}
    assert differences(unknown, fewer) == (said,)


def test_a_hub_model_is_told_by_its_commit_where_both_are_known():
    shape = {"n_params": 10, "files": ""}
    one, other, unknown = ({"model": {"name": "a/b", "revision": r, **shape}} for r in ("1", "2", ""))
    assert differences(one, other) == ("model  a/b: its revision changed",)
    assert differences(one, unknown) == differences(unknown, other) == ()


def test_what_is_free_in_the_table_exists():
    assert table_fields("trl").keys() >= FREE_TRL


def test_what_the_machine_decides_may_change_and_is_said(model, killed, whole):
    run = finetune(model, killed(4), resume=True, per_device_train_batch_size=2, dtype="bf16", max_minutes=60)
    split = f"{whole.plan.micro_batch_size} x {whole.plan.gradient_accumulation_steps}"
    assert f"re-planned: {split} -> 2 x 2, dtype fp32 -> bf16; same effective batch 4" in run.plan.notes
    assert run.status == "done"
    losses = [e.loss for e in run.report.steps]
    assert losses[:4] == [e.loss for e in whole.report.steps][:4]
    assert losses[4:] == pytest.approx([e.loss for e in whole.report.steps][4:], rel=0.05)
    assert losses[4:] != [e.loss for e in whole.report.steps][4:]


def test_another_split_rounds_otherwise_and_no_more(model, killed, whole):
    run = finetune(model, killed(4), resume=True, per_device_train_batch_size=1, lora_dropout=0.1)
    assert run.plan.gradient_accumulation_steps == 4 != whole.plan.gradient_accumulation_steps
    assert [e.n_tokens for e in run.report.steps] == [e.n_tokens for e in whole.report.steps], "other rows in a step"


def test_another_card_is_planned_anew_with_the_same_effective_batch(model, killed):
    options = {**OPTIONS, "model": str(model), "output_dir": str(killed(4)), "data": ROWS}
    config = FinetuneConfig(**{**options, "gradient_checkpointing": "full"})
    t4 = dataclasses.replace(device_spec(), name="Tesla T4")
    found = begin(config, look(config, "run", lambda line: None, t4), resume=True, how="")
    said = r"re-planned for Tesla T4: layers 3 keep -> 3 recompute; same effective batch 4"
    assert any(re.fullmatch(said, n) for n in found.plan.notes), found.plan.notes
    assert found.plan.effective_batch_size == 4 and found.checkpoint is not None


def test_the_same_machine_keeps_the_split_of_then(model, killed):
    # As if there had been less memory then: today's plan alone would take all four rows at once.
    out = killed(4)
    then = {"micro_batch_size": 2, "gradient_accumulation_steps": 2, "layers": {"recompute": 1, "keep": 2}}
    edit_state(out, 4, lambda state: state["state"]["plan"].update(then))
    run = finetune(model, out, resume=True, max_minutes=1e-9)
    assert (run.plan.micro_batch_size, run.plan.gradient_accumulation_steps) == (2, 2)
    assert [p.value for p in run.plan.layer_policies].count("recompute") == 1
    assert not any(n.startswith("re-planned") for n in run.plan.notes)


def test_other_versions_are_said(model, killed):
    out = killed(8)
    edit_state(out, 8, lambda state: state["state"]["versions"].update(torch="2.0"))

    said = f"other versions: torch 2.0 -> {torch.__version__}; the last digits may differ"
    assert said in finetune(model, out, resume=True).plan.notes
