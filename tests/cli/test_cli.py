"""The shell commands, in process and as a program."""

from __future__ import annotations

import json

import pytest

from nbqlora.cli import main

BODY = 'model = "{model}"\ndata = "rows.jsonl"   # mine\nmax_steps = 2\nmax_length = 96\neffective_batch_size = 4\n'


@pytest.fixture
def folder(tmp_path, tiny_folder, tiny_rows, monkeypatch):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, tiny_rows)))
    (tmp_path / "job.toml").write_text(BODY.format(model=tiny_folder))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_plan_says_what_would_be_done_and_writes_nothing(folder, capsys):
    assert main(["plan", "job.toml"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("data  rows.jsonl: ") and "\nplan  " in said
    assert not (folder / "runs").exists()


def test_finetune_goes_the_whole_way(folder, capsys):
    assert main(["finetune", "job.toml"]) == 0
    said = capsys.readouterr().out
    for part in ("[load]", "[train] 2 steps", "step 2/2", "[save]", "job: done in"):
        assert part in said
    assert (folder / "runs/job/adapter/adapter_model.safetensors").exists()


def test_errors_are_short_and_end_with_status_1(folder, capsys):
    (folder / "bad.toml").write_text('model = "demo"\nlora_rank = 3\n\ndata = rows\n')
    assert main(["finetune", "bad.toml"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "ConfigError: 2 problems in bad.toml",
        "  line 2  lora_rank  unknown key; did you mean lora_r?",
        '  line 4  data       text needs quotes; write data = "rows"',
    ]
    assert main(["plan", "nowhere.toml"]) == 1
    assert "nowhere.toml" in capsys.readouterr().err


def test_a_notebook_object_makes_no_sense_in_a_file(folder, capsys):
    (folder / "bad.toml").write_text('model = "demo"\ndata = "$rows"\n')
    assert main(["plan", "bad.toml"]) == 1
    assert "$rows names an object of a notebook, and there is none here" in capsys.readouterr().err


def test_vram_is_one_line(capsys):
    assert main(["vram"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_fetch_names_the_folder(capsys):
    assert main(["demo", "--fetch"]) == 0
    assert "the demo model is in " in capsys.readouterr().out


def test_a_run_that_ended_early_goes_on_with_resume(folder, capsys):
    written = (folder / "job.toml").read_text()
    (folder / "job.toml").write_text(written + "max_minutes = 0.000001\n")
    assert main(["finetune", "job.toml"]) == 0
    assert "job: stopped (max_minutes reached) in" in capsys.readouterr().out
    (folder / "job.toml").write_text(written)
    assert main(["plan", "job.toml"]) == 0
    offer = " ".join(capsys.readouterr().out.split())
    assert "runs/job holds 1 of 2 steps of this same run, saved" in offer
    assert "stop this and run nbqlora finetune job.toml --resume to go on from there" in offer
    assert main(["finetune", "job.toml", "--resume"]) == 0
    said = capsys.readouterr().out
    assert "  resumed after step 1 of 2, saved " in said
    assert "[train] 1 of 2 steps" in said and "step 2/2" in said and "step 1/2" not in said
    assert "steps      2 of 2" in said
    (folder / "job.toml").write_text(written.replace("max_steps = 2", "max_steps = 3"))
    assert main(["finetune", "job.toml", "--resume"]) == 1
    assert "max_steps  2 -> 3" in capsys.readouterr().err
