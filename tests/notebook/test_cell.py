"""The magics in a real IPython shell: what a cell prints, binds and raises."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import nbqlora
from nbqlora.core.errors import ConfigError


@pytest.fixture
def shell(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    nbqlora.load_ipython_extension(shell)
    yield shell
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()


def run(shell, cell):
    with capture_output() as said:
        result = shell.run_cell(cell)
    return result, re.sub(r"\x1b\[[0-9;]*m", "", said.stdout + said.stderr), said.outputs


def test_all_problems_of_a_cell_with_the_lines_of_the_editor(shell):
    result, text, _ = run(
        shell,
        "%%finetune run1\n# rows of mine\nmodel = demo\ndata = \"$rws\"\nlora_rank = 3\n\nlearning_rate = 'fast'\n",
    )
    assert isinstance(result.error_in_exec, ConfigError)
    assert text.splitlines() == [
        "ConfigError: 4 problems in this cell",
        '  line 3  model          text needs quotes; write model = "demo"',
        "  line 4  data           this notebook has no object rws; run the cell that makes rws first",
        "  line 5  lora_rank      unknown key; did you mean lora_r?",
        '  line 7  learning_rate  expected a number above 0 and below 1, got "fast"',
    ]
    assert "run1" not in shell.user_ns


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("%%finetune run1\n\n", "1 problem in this cell\n  it is empty"),
        (
            "%%finetune run1 --plann\nmodel='demo'\n",
            "in the %%finetune line\n  %%finetune  unrecognized arguments: --plann; did you mean --plan?",
        ),
        ("%%finetune run-1\nmodel='demo'\n", "'run-1' cannot be a variable's name; write %%finetune run_1"),
        ("%%finetune class\nmodel='demo'\n", "'class' cannot be a variable's name"),
        ("%%finetune print\nmodel='demo'\n", "'print' cannot be a variable's name"),
        ("%vram --whoo", "1 problem in the %vram line\n  %vram  unrecognized arguments: --whoo"),
    ],
)
def test_what_is_wrong_on_the_line_is_a_real_error(shell, cell, message):
    result, text, _ = run(shell, cell)
    assert isinstance(result.error_in_exec, ConfigError)
    assert message in text
    assert "Traceback" not in text


def test_traceback_is_shown_when_asked_for(shell):
    _, text, _ = run(shell, "%%finetune run1 --traceback\nmodel = 3\n")
    assert "Traceback (most recent call last)" in text
    assert "expected text, got 3" in text


def test_plan_stops_before_anything_is_loaded(shell, tiny_folder, tiny_rows):
    shell.user_ns["rows"] = tiny_rows
    result, text, outputs = run(shell, f'%%finetune p --plan\nmodel = "{tiny_folder}"\ndata = "$rows"\n')
    assert result.error_in_exec is None, text
    assert repr(shell.user_ns["p"]).startswith("Plan(")
    data, shown = outputs
    assert data.data["text/plain"].startswith("data  ") and "<details" in data.data["text/html"]
    assert shown.data["text/plain"].startswith("plan  ")
    assert "<table" in shown.data["text/html"]


def test_a_cell_trains_binds_a_run_and_shows_plan_report_and_figure(shell, tiny_folder, tiny_rows):
    shell.user_ns["rows"] = tiny_rows
    cell = f'%%finetune run1\nmodel = "{tiny_folder}"\ndata = "$rows"   # mine\nmax_steps = 2\nmax_length = 96\n'
    result, text, outputs = run(shell, cell)
    assert result.error_in_exec is None, text
    assert shell.user_ns["run1"].status == "done"
    kinds = [sorted(o.data) for o in outputs]
    assert kinds == [*[["text/html", "text/plain"]] * 3, ["image/png", "text/plain"]]
    assert outputs[2].data["text/plain"].startswith("run1: done in")
    assert text == "", "something else was printed into the cell"
    assert result.result is None


def test_vram_is_one_line_and_a_bar(shell):
    result, _, (shown,) = run(shell, "%vram            # what memory there is")
    assert result.error_in_exec is None
    assert len(shown.data["text/plain"].splitlines()) == 1
    assert 'role="img"' in shown.data["text/html"]


def test_loading_the_extension_is_quick_and_imports_no_torch():
    code = """
import sys, time
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
begun = time.perf_counter()
shell.run_line_magic("load_ext", "nbqlora")
took = time.perf_counter() - begun
heavy = {"torch", "transformers", "ipywidgets", "matplotlib", "trl", "datasets"} & set(sys.modules)
print(took < 0.3, sorted(heavy), took)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("True []"), done.stdout + done.stderr[-800:]


def test_the_magics_document_themselves(shell):
    assert "--plan" in shell.find_cell_magic("finetune").__doc__


def test_an_answer_is_shown_with_its_line_breaks(shell):
    from nbqlora.core.report import Answer

    shell.user_ns["answer"] = Answer("In short: x\nBecause: y")
    _, text, _ = run(shell, "answer")
    assert "In short: x\nBecause: y" in text
    assert isinstance(shell.user_ns["answer"], str)


def test_a_run_cannot_take_the_place_of_its_rows(shell, tiny_rows):
    shell.user_ns["rows"] = tiny_rows
    result, text, _ = run(shell, "%%finetune rows\nmodel = 'demo'\ndata = '$rows'\n")
    assert isinstance(result.error_in_exec, ConfigError)
    assert "rows is an object that this cell reads, and the run would replace it" in text
    assert shell.user_ns["rows"] is tiny_rows


def test_a_cell_with_resume_goes_on_and_shows_the_whole_run(shell, tiny_folder, tiny_rows):
    shell.user_ns["rows"] = tiny_rows
    body = f'model = "{tiny_folder}"\ndata = "$rows"\nmax_steps = 3\nmax_length = 96\n'
    result, text, _ = run(shell, f"%%finetune mine\n{body}max_minutes = 0.000001\n")
    assert result.error_in_exec is None, text
    assert shell.user_ns["mine"].status == "stopped"
    _, _, outputs = run(shell, f"%%finetune mine --plan\n{body}")
    offer = "stop this and write %%finetune mine --resume to go on from there"
    assert offer in " ".join(outputs[-1].data["text/plain"].split())
    result, text, outputs = run(shell, f"%%finetune mine --resume\n{body}")
    assert result.error_in_exec is None, text
    assert [e.step for e in shell.user_ns["mine"].report.steps] == [1, 2, 3]
    shown = "\n".join(o.data["text/plain"] for o in outputs)
    assert "goes on after step 1 of 3, saved" in shown and "steps      3 of 3" in shown
    result, text, _ = run(shell, f"%%finetune mine --resume\n{body}learning_rate = 0.1\n")
    assert type(result.error_in_exec).__name__ == "RunError" and "Traceback" not in text
    assert "  learning_rate  0.0002 -> 0.1" in text.splitlines()
