"""The nine steps on a tiny model: what a Run can do, what it leaves, and what it gives back."""

from __future__ import annotations

import gc
import json
import os
import pickle
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch

import nbqlora
from nbqlora.core.errors import DoesNotFitError, ModelError, RunError
from nbqlora.core.events import PhaseEvent, PlannedEvent, SavedEvent, StepEvent

OPTIONS = {
    "max_length": 96, "effective_batch_size": 4, "learning_rate": 1e-2, "lora_r": 4, "warmup_ratio": 0,
    "packing": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_folder, tiny_rows, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return nbqlora.finetune(
        name="first", model=str(tiny_folder), data=tiny_rows, eval_data=tiny_rows[:3], output_dir=str(out), **OPTIONS
    )


def test_the_steps_happen_in_order_and_the_report_sums_them_up(finished):
    phases = [e.phase for e in finished.events if isinstance(e, PhaseEvent)]
    assert phases == ["look", "load", "train", "save"]
    kinds = [type(e) for e in finished.events]
    assert kinds.index(PlannedEvent) < kinds.index(StepEvent) < kinds.index(SavedEvent)
    assert finished.status == "done"
    assert [e.step for e in finished.report.steps] == [1, 2, 3]
    assert finished.report.steps[-1].loss < finished.report.steps[0].loss
    assert len(finished.report.evals) == 2
    assert sum(e.n_tokens for e in finished.report.steps) == finished.plan.data.n_tokens


def test_run_json_holds_everything_and_no_rows(finished, tiny_rows):
    record = json.loads((finished.adapter_dir.parent / "run.json").read_text())
    assert record["status"] == "done"
    assert record["config"]["data"] == "<list of 12 rows>"
    assert record["config"]["lora_r"] == 4
    assert record["plan"]["micro_batch_size"] * record["plan"]["gradient_accumulation_steps"] == 4
    assert record["versions"]["torch"] == torch.__version__
    assert len(record["events"]) == len(finished.events)
    assert tiny_rows[0]["messages"][0]["content"] not in json.dumps(record)


def test_the_adapter_loads_in_a_process_that_does_not_know_nbqlora(finished, tiny_folder):
    code = f"""
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({str(tiny_folder)!r}, dtype=torch.float32)
model = PeftModel.from_pretrained(base, {str(finished.adapter_dir)!r})
ids = AutoTokenizer.from_pretrained({str(finished.adapter_dir)!r})("hello", return_tensors="pt")["input_ids"]
tuned = model(input_ids=ids).logits
with model.disable_adapter():
    assert not torch.allclose(tuned, model(input_ids=ids).logits), "the adapter does nothing"
assert model.peft_config["default"].r == 4 and "nbqlora" not in sys.modules
print("loaded")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=finished.adapter_dir)
    assert done.stdout.strip() == "loaded", done.stderr[-2000:]


def test_chat_and_compare_use_the_adapter_and_reload_it_when_freed(finished):
    before = finished.chat("sun moon", max_new_tokens=8)
    table = finished.compare("sun moon", max_new_tokens=8)
    assert table.rows[0][0] == "sun moon"
    assert table.rows[0][2] == before
    assert table.rows[0][1] != table.rows[0][2]
    finished.free()
    assert finished._session.loaded is None
    assert finished.chat("sun moon", max_new_tokens=8) == before
    assert "> sun moon" in str(table)


def test_a_pickled_run_holds_no_tensors_and_still_talks(finished):
    answer = finished.chat("river", max_new_tokens=6)
    packed = pickle.dumps(finished)
    assert len(packed) < 200_000
    again = pickle.loads(packed)
    assert repr(again) == repr(finished)
    assert again.chat("river", max_new_tokens=6) == answer


def test_repr_is_one_short_line(finished):
    assert repr(finished) == f"Run(first: done, 3 steps, loss {finished.report.steps[-1].loss:.3f})"
    assert "tensor" not in repr(finished.report)
    assert finished._repr_html_().count("<table") == 3, "rows, phases and holders"


def test_plot_is_a_png(finished):
    assert finished.plot()._repr_png_()[:4] == b"\x89PNG"


def _tensor_bytes() -> int:
    gc.collect()
    alive = (o for o in gc.get_objects() if isinstance(o, torch.Tensor))
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}.values())


def test_three_runs_end_at_the_same_memory(tiny_folder, tiny_rows, tmp_path):
    options = dict(model=str(tiny_folder), data=tiny_rows, output_dir=str(tmp_path), max_steps=2, **OPTIONS)
    held, firsts = [], []
    for _ in range(3):
        run = nbqlora.finetune(**options)
        firsts.append(weakref.ref(next(run._session.loaded.model.parameters())))
        held.append(_tensor_bytes())
    assert held[0] == held[1] == held[2]
    assert [r() is None for r in firsts] == [True, True, False], "a finished run kept its model"
    run.free()
    assert firsts[2]() is None


THREE_RUNS = """
import json, sys
import psutil
import nbqlora
options, rows, resident = json.loads(sys.argv[1]), json.loads(sys.argv[2]), []
for _ in range(3):
    run = nbqlora.finetune(data=rows, **options)
    resident.append(psutil.Process().memory_info().rss)
print(json.dumps(resident))
"""


def test_a_process_grows_no_more_after_its_second_run(tiny_folder, tiny_rows, tmp_path):
    # In a process of its own: what hundreds of tests left to the C allocator moves by more than a run.
    options = {"model": str(tiny_folder), "output_dir": str(tmp_path), "max_steps": 2, **OPTIONS}
    command = [sys.executable, "-c", THREE_RUNS, json.dumps(options), json.dumps(tiny_rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    resident = json.loads(done.stdout.splitlines()[-1])
    assert resident[2] - resident[1] < 32 << 20


def test_a_plan_reads_no_weights(tiny_folder, tiny_rows, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny_folder.iterdir():
        if file.suffix != ".safetensors":
            (bare / file.name).write_bytes(file.read_bytes())
    plan = nbqlora.plan(model=str(bare), data=tiny_rows, **OPTIONS)
    assert plan.effective_batch_size == 4
    assert not (tmp_path / "runs").exists()


def test_what_does_not_fit_is_said_before_weights_are_read(tiny_folder, tiny_rows, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (tiny_folder / name).exists():
            (tmp_path / name).write_bytes((tiny_folder / name).read_bytes())
    with pytest.raises(DoesNotFitError, match=r"vram_gib = 0.001 is your own limit"):
        nbqlora.finetune(model=str(tmp_path), data=tiny_rows, vram_gib=0.001, **OPTIONS)


def test_unknown_target_modules_are_named_before_loading(tiny_folder, tiny_rows):
    with pytest.raises(nbqlora.ConfigError, match=r"no linear named query_proj; it has q_proj, k_proj"):
        nbqlora.plan(model=str(tiny_folder), data=tiny_rows, target_modules=["q_proj", "query_proj"], **OPTIONS)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./no-such-folder", r"no such folder: \./no-such-folder"),
        ("EMPTY", r"is a folder without config.json"),
    ],
)
def test_models_that_are_not_there(model, message, tiny_rows, tmp_path):
    name = str(tmp_path) if model == "EMPTY" else model
    with pytest.raises(ModelError, match=message):
        nbqlora.plan(model=name, data=tiny_rows)


def test_a_hub_id_without_a_network_says_so(tiny_rows, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"^nobody/nothing is not in the cache, and "):
        nbqlora.plan(model="nobody/nothing", data=tiny_rows)


def test_a_run_that_saved_nothing_says_so(finished):
    import dataclasses

    from nbqlora.run.result import Run

    bare = dataclasses.replace(finished.report, adapter=None, status="failed")
    run = Run(
        report=bare, config=finished.config, session=finished._session, reload=lambda p: None, again=finished._again
    )
    with pytest.raises(RunError, match="first saved no adapter"):
        _ = run.adapter_dir


def test_the_output_folder_defaults_to_the_runs_name(tiny_folder, tiny_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = nbqlora.finetune(name="mine", model=str(tiny_folder), data=tiny_rows, max_steps=1, **OPTIONS)
    assert Path(run.report.adapter.path) == Path("runs/mine/adapter")
    assert sorted(os.listdir("runs/mine")) == ["adapter", "checkpoints", "run.json"]
    again = nbqlora.plan(name="mine", model=str(tiny_folder), data=tiny_rows, **OPTIONS)
    assert "runs/mine holds the adapter of an earlier run, which this one replaces" in again.notes
    monkeypatch.chdir("/")
    run.free()
    assert run.chat("sun", max_new_tokens=2) is not None, "the folder was forgotten when the notebook moved"


def test_a_data_frame_is_data(tiny_folder, tiny_rows):
    import pandas

    plan = nbqlora.plan(model=str(tiny_folder), data=pandas.DataFrame(tiny_rows), **OPTIONS)
    assert plan.data.n_rows == 12


def test_few_steps_are_said(tiny_folder, tiny_rows):
    options = {"model": str(tiny_folder), "data": tiny_rows, "effective_batch_size": 12}
    packed = nbqlora.plan(**options)
    assert "only 1 optimizer step for 1 pack; a smaller effective_batch_size learns more often" in packed.notes
    plan = nbqlora.plan(**options, packing=False)
    assert "only 1 optimizer step for 12 rows; a smaller effective_batch_size learns more often" in plan.notes


def test_a_misspelt_demo_is_not_looked_for_on_the_hub(tiny_rows):
    with pytest.raises(ModelError, match='there is no model demoo; did you mean "demo"'):
        nbqlora.plan(model="demoo", data=tiny_rows)


def test_the_adapters_page_names_no_folder_of_this_machine(finished, tiny_folder):
    page = (finished.adapter_dir / "README.md").read_text()
    assert "A LoRA adapter (rank 4" in page
    assert "base_model" not in page


def test_an_interrupt_while_loading_is_short_and_frees_the_memory(tiny_folder, tiny_rows, tmp_path, monkeypatch):
    from nbqlora.core.errors import InterruptedRunError
    from nbqlora.core.events import PhaseEvent as Phase

    def interrupt(event):
        if isinstance(event, Phase) and event.phase == "load":
            raise KeyboardInterrupt

    with pytest.raises(InterruptedRunError, match="interrupted before training began; nothing was saved") as caught:
        nbqlora.finetune(model=str(tiny_folder), data=tiny_rows, output_dir=str(tmp_path), observe=interrupt, **OPTIONS)
    assert isinstance(caught.value, KeyboardInterrupt)


def test_a_checkpoint_stored_in_4_bits_takes_this_runs_dtype(tiny_folder, tiny_rows, tmp_path):
    from tests.tiny import load_nf4, make_tokenizer

    stored = tmp_path / "nf4"
    load_nf4(tiny_folder, dtype=torch.bfloat16).save_pretrained(stored)
    make_tokenizer().save_pretrained(stored)
    run = nbqlora.finetune(
        model=str(stored), data=tiny_rows, output_dir=str(tmp_path / "out"), dtype="fp32", max_steps=3, **OPTIONS
    )
    model = run._session.loaded.model
    assert run.plan.model.quantized
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert run.report.steps[-1].loss < run.report.steps[0].loss


def test_a_wrong_peft_setting_is_a_short_error(tiny_folder, tiny_rows):
    with pytest.raises(ModelError, match="LoRA cannot be put on this model"):
        nbqlora.finetune(model=str(tiny_folder), data=tiny_rows, peft={"layers_to_transform": [99]}, **OPTIONS)
