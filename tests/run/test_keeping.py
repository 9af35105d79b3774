"""What a run learned is kept: on a full disk, from a damaged folder, and as a merge or a file for llama.cpp."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nbqlora
from nbqlora.cli import main
from nbqlora.core.errors import ConfigError, DoesNotFitError, ModelError, OutOfDiskError, RunError
from nbqlora.core.events import NoteEvent
from nbqlora.hub.merge_journal import damage
from nbqlora.run.keeping import check_one_card_holds
from tests import tiny
from tests.hub.merging import plain_logits
from tests.mounts import mounted
from tests.planner.several import PAIR_80, plan
from tests.planner.shapes import GIB, options
from tests.run.resuming import finetune

pytestmark = pytest.mark.usefixtures("quick")
IDS = torch.arange(3, 30)[None]


@pytest.fixture(scope="module")
def run(quick: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> nbqlora.Run:
    return finetune(model, tmp_path_factory.mktemp("run") / "out", lora_r=4)


def test_merge_from_a_run_from_python_and_from_a_shell_is_the_same(run, tmp_path, capsys):
    report = run.merge(tmp_path / "of the run")
    assert report.check.agrees and report.n_changed == 7 * tiny.LAYERS
    assert f"merged into {report.path}" in str(report) and "same next token" in report._repr_html_()
    nbqlora.merge(run.adapter_dir.parent, tmp_path / "of python")
    assert main(["merge", str(run.adapter_dir), str(tmp_path / "of a shell"), "--max-shard-size", "200KB"]) == 0
    assert "merged into" in capsys.readouterr().out
    for name in ("of python", "of a shell"):
        assert torch.equal(plain_logits(tmp_path / name, IDS), plain_logits(report.path, IDS))
        assert damage(tmp_path / name) == ""


def test_merge_of_what_training_saw_needs_no_loaded_model(run, tmp_path):
    run.chat("hello", max_new_tokens=1)  # loads it
    loaded = run.merge(tmp_path / "loaded", base="nf4", dtype="fp32")
    run.free()
    freed = run.merge(tmp_path / "freed", base="nf4", dtype="fp32")
    assert torch.equal(plain_logits(loaded.path, IDS), plain_logits(freed.path, IDS))
    other = run.merge(tmp_path / "original", dtype="fp32")
    assert not torch.equal(plain_logits(other.path, IDS), plain_logits(freed.path, IDS))


def test_a_merge_answers_in_a_fresh_process_without_nbqlora(run, tmp_path):
    run.merge(tmp_path / "merged")
    script = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = AutoModelForCausalLM.from_pretrained(sys.argv[1]), AutoTokenizer.from_pretrained(sys.argv[1])
asked = tokenizer.apply_chat_template([{"role": "user", "content": "sun moon"}], add_generation_prompt=True,
                                      return_tensors="pt", return_dict=True)
said = model.generate(**asked, max_new_tokens=5, do_sample=False)
assert "nbqlora" not in sys.modules
print(said.shape)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "merged")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_export_from_a_run_and_from_a_shell_is_the_same(run, tmp_path, capsys):
    exported = run.export_gguf(tmp_path / "run.gguf", "F16")
    assert str(exported).splitlines()[0].startswith(f"exported to {tmp_path / 'run.gguf'}: ")
    assert "as llama.cpp names it" in exported._repr_html_()
    arguments = ["export", str(run.adapter_dir.parent), str(tmp_path / "run2.gguf"), "--quantization", "F16"]
    assert main(arguments) == 0 and "exported to" in capsys.readouterr().out
    assert (tmp_path / "run.gguf").stat().st_size == exported.n_bytes > 100_000
    with pytest.raises(ModelError, match="Q9_X"):
        run.export_gguf(tmp_path / "other.gguf", "Q9_X")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.gguf", "run2.gguf"]


def test_wrong_settings_are_told_before_anything_is_written(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="'int8' is none of original, nf4"):
        run.merge(tmp_path / "merged", base="int8")
    with pytest.raises(ConfigError, match="maximum_memory_usage"):
        run.export_gguf(tmp_path / "out.gguf", maximum_memory_usage=1.0)
    with pytest.raises(ConfigError, match="is none of original, nf4"):
        run.export_gguf(tmp_path / "out.gguf", base="q4")
    with pytest.raises(RunError, match="holds no adapter"):
        nbqlora.merge(tmp_path, tmp_path / "merged")
    with pytest.raises(RunError, match="no such folder"):
        nbqlora.merge(tmp_path / "nowhere", tmp_path / "merged")
    with pytest.raises(RunError, match="no adapter was named"):
        nbqlora.merge([], tmp_path / "merged")
    assert main(["merge", str(tmp_path / "nowhere"), str(tmp_path / "merged")]) == 1
    assert capsys.readouterr().err.startswith("RunError: no such folder")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_adapter_is_not_merged(model, tmp_path):
    run = finetune(model, tmp_path / "out", lora_r=4, max_steps=2)
    run.free()
    weights = run.adapter_dir / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    said = "cannot be used: adapter_model.safetensors is not what was written; the same one in .* is whole"
    with pytest.raises(ModelError, match=said):
        run.merge(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    # To talk to, the same weights in the last checkpoint will do.
    with pytest.warns(UserWarning, match="using the same one in .*step-000002"):
        run.chat("hello", max_new_tokens=1)


def test_a_full_disk_at_the_last_save_does_not_lose_the_adapter(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with mounted(tmp_path / "disk", "96m") as disk:
        fill = disk / "other files"

        def fill_up(event):
            if type(event).__name__ == "StepEvent" and event.step == 2 and not fill.exists():
                with pytest.raises(OSError), fill.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(1 << 20))

        run = finetune(model, disk / "out", lora_r=4, max_steps=3, save_minutes=0, observe=fill_up)
        assert run.status == "done"
        told = [e.text for e in run.events if isinstance(e, NoteEvent) and "so the adapter is in" in e.text]
        assert len(told) == 1 and str(run.adapter_dir) in told[0]
        assert not run.adapter_dir.is_relative_to(disk)
        assert "no " in run.report.reason and "run.json" in run.report.reason
        run.free()
        assert run.chat("hello", max_new_tokens=1) is not None


def test_no_disk_at_all_is_an_error(run, tmp_path):
    from nbqlora.run.keeping import save_somewhere

    run.chat("hello", max_new_tokens=1)
    with mounted(tmp_path / "disk", "64k") as disk, pytest.MonkeyPatch.context() as patch:
        patch.chdir(disk)
        patch.setenv("HOME", str(disk))
        patch.setattr("tempfile.tempdir", str(disk))
        with pytest.raises(OutOfDiskError, match="saving the adapter needs"):
            save_somewhere(run._session.loaded, disk / "out", "demo", pytest.fail)


def test_a_split_model_that_one_card_cannot_hold_says_so_before_it_is_loaded() -> None:
    config = options(gpus=2, fsdp=True)
    found = plan("70B", PAIR_80, fsdp=True)
    check_one_card_holds(config, found, 80 * GIB)
    with pytest.raises(DoesNotFitError, match=r"70B needs 36\.\d GiB to talk, on one card, where 22\.0 GiB are free"):
        check_one_card_holds(config, found, 22 * GIB)
