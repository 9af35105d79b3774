"""``%vram`` and its flags in a real IPython shell: what a cell shows, what it gives back, and what it refuses."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import nbqlora
from nbqlora.core.errors import ConfigError
from nbqlora.core.fit import FitReport
from nbqlora.core.holders import FreedReport, HoldersReport
from nbqlora.core.report import VramReport
from nbqlora.notebook.meter import Watch, cell_line

GIB = 1 << 30


@pytest.fixture
def shell(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell.instance()
    nbqlora.load_ipython_extension(shell)
    yield shell
    shell.run_cell("%vram --cells off")
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()


def run(shell: Any, cell: str) -> tuple[Any, str, list[dict[str, str]]]:
    """What the cell ended with, printed and displayed."""
    with capture_output() as said:
        result = shell.run_cell(cell, store_history=True)
    return result, re.sub(r"\x1b\[[0-9;]*m", "", said.stdout + said.stderr), [o.data for o in said.outputs]


def test_it_shows_one_line_and_a_bar_once_wherever_it_stands(shell: Any) -> None:
    for cell in ("%vram            # what memory there is", "%vram\nx = 1", "r = %vram"):
        result, _, (shown,) = run(shell, cell)
        assert result.error_in_exec is None
        assert len(shown["text/plain"].splitlines()) == 1
        assert 'role="img"' in shown["text/html"]


def test_it_gives_data_that_shows_itself_later_and_holds_nothing_back(shell: Any) -> None:
    run(shell, "r = %vram")
    report = shell.user_ns["r"]
    assert isinstance(report, VramReport) and sum(report.by_category.values()) == report.used_bytes
    assert pickle.loads(pickle.dumps(report)) == report
    _, text, _ = run(shell, "r")
    assert str(report) in text, "shown as any value in the cells behind its own"


def test_json_is_printed_and_given_back(shell: Any) -> None:
    result, text, shown = run(shell, "r = %vram --json")
    assert result.error_in_exec is None and shown == []
    assert json.loads(text) == shell.user_ns["r"]
    for line in ("%vram --json --who", "%vram --free --json"):
        _, text, _ = run(shell, line)
        assert json.loads(text[text.index("{") : text.rindex("}") + 1])["has_card"] is False


def test_who_and_free_answer_for_this_shell(shell: Any) -> None:
    run(shell, "import torch\nbig = torch.ones(2**20)")
    run(shell, "torch.ones(2**24)")  # so large that the C library maps it by itself, and unmaps it
    result, _, (shown,) = run(shell, "%vram --who")
    assert isinstance(result.result, HoldersReport)
    lines = [" ".join(line.split()) for line in shown["text/plain"].splitlines()]
    assert lines[:2] == ["who holds memory", "RAM"]
    assert lines[2:] == ["big 4 MiB del big", "Out[2] 0.06 GiB --free; also _"]
    assert "<table" in shown["text/html"] and "del big" in shown["text/html"]
    result, _, (shown,) = run(shell, "f = %vram --free")
    found = shell.user_ns["f"]
    assert isinstance(found, FreedReport) and found.total_bytes > 60 << 20
    assert shown["text/plain"].startswith("freed  ") and "results of cells" in shown["text/plain"]
    assert "big" in shell.user_ns and 2 not in shell.user_ns["Out"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--whoo", "in the %vram line\n  %vram  unrecognized arguments: --whoo; did you mean --who?"),
        ("--who --free", "in the %vram line\n  %vram  --who and --free are different questions; write a line for each"),
        (
            "--fit demo --cells on --watch",
            "%vram  --watch and --fit and --cells are different questions; write a line for each",
        ),
        ("--watch --json", "%vram  --watch gives no data; leave out --json"),
        ("--cells on --json", "%vram  --cells gives no data; leave out --json"),
        ("--cells", "%vram  argument --cells: expected one argument; %vram? lists what it takes"),
        ("--cells yes", "%vram  argument --cells: invalid choice: 'yes'"),
        ("--fit", "%vram  argument --fit: expected at least one argument"),
        ("--fit demo max_length", "'max_length' is no option; write key=value without spaces: max_length=4096"),
        ("--fit demo max_length =64", "'max_length' is no option"),
        (
            "--fit demo lora_rank=8 max_length=-1",
            "2 problems in %vram --fit\n"
            "  lora_rank   unknown key; did you mean lora_r?\n"
            "  max_length  expected a whole number of at least 8, got -1",
        ),
        ("--fit demo data=$rws", "data  this notebook has no object rws; run the cell that makes rws first"),
    ],
)
def test_what_is_wrong_is_a_short_real_error(shell: Any, line: str, message: str) -> None:
    result, text, _ = run(shell, f"%vram {line}")
    assert isinstance(result.error_in_exec, ConfigError)
    assert message in text
    assert "Traceback" not in text


def test_a_model_that_fits_and_one_that_does_not(shell: Any, tiny_folder: Any, tiny_rows: Any) -> None:
    result, _, (shown,) = run(shell, f'%vram --fit "{tiny_folder}" max_length=128 dtype=fp32')
    assert isinstance(result.result, FitReport) and result.result.fits
    assert result.result.plan.dtype == "fp32"
    assert shown["text/plain"].startswith(f"{tiny_folder} fits: ") and "assumed: rows" in shown["text/plain"]
    assert 'role="img"' in shown["text/html"]
    result, _, (shown,) = run(shell, f"%vram --fit {tiny_folder} vram_gib=0.1")
    assert not result.result.fits and f"{tiny_folder} does not fit" in shown["text/plain"]
    shell.user_ns["rows"] = tiny_rows
    result, _, (shown,) = run(shell, f"%vram --fit {tiny_folder} data=$rows")
    assert result.result.plan.data.n_rows == 12 and "assumed" not in shown["text/plain"]


def test_a_line_after_each_cell(shell: Any) -> None:
    _, text, _ = run(shell, "%vram --cells on")
    assert text == ""
    _, text, _ = run(shell, "kept = bytearray(b'x') * (64 << 20)")
    assert re.fullmatch(r"ram   \+0\.0[67]\d? GiB, now \S+ GiB, peak \S+ GiB\n", text), text
    run(shell, "%vram --cells on")
    _, text, _ = run(shell, "x = 1")
    assert text.count("ram ") == 1, "switched on twice, it is said once"
    run(shell, "%vram --cells off")
    _, text, _ = run(shell, "x = 1")
    assert text == ""


def test_how_a_cell_is_told() -> None:
    assert cell_line("cuda", 4 * GIB, int(5.25 * GIB), 7 * GIB) == "vram  +1.2 GiB, now 5.2 GiB, peak 7.0 GiB"
    assert cell_line("cpu", 4 * GIB, 3 * GIB, 3 * GIB) == "ram   -1.0 GiB, now 3.0 GiB, peak 3.0 GiB"
    assert cell_line("cuda", GIB, GIB + 5, 0) == "vram  +0 MiB, now 1.0 GiB, peak 1.0 GiB"


def test_a_static_page_gets_one_state(shell: Any) -> None:
    result, _, (shown,) = run(shell, "%vram --watch")
    assert isinstance(result.result, VramReport) and "updates" not in shown["text/plain"]


def test_a_meter_stops_by_itself_and_leaves_nothing_behind(shell: Any) -> None:
    before = {event: len(found) for event, found in shell.events.callbacks.items()}
    with capture_output():
        meter = Watch(shell, idle_seconds=0.2)
        time.sleep(0.6)
        assert not meter.stopped, "the cell that started it still runs"
        meter._end()
        meter._thread.join(timeout=5)
    assert meter.stopped
    assert {event: len(found) for event, found in shell.events.callbacks.items()} == before


def test_it_is_quick_and_starts_nothing() -> None:
    code = """
import sys, time
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbqlora")
took = []
with capture_output():
    for _ in range(4):
        begun = time.perf_counter()
        shell.run_line_magic("vram", "")
        took.append(time.perf_counter() - begun)
heavy = {"torch", "transformers", "ipywidgets", "matplotlib", "trl", "datasets", "nbqlora.run"} & set(sys.modules)
print(min(took[1:]) < 0.05, took[0] < 0.5, sorted(heavy), took)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith("True True []"), done.stdout + done.stderr[-800:]


def test_no_flag_starts_cuda() -> None:
    code = """
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "nbqlora")
with capture_output():
    for line in ("", "--who", "--free", "--json", "--cells on", "--cells off"):
        shell.run_line_magic("vram", line)
print(torch.cuda.is_initialized())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stdout + done.stderr[-800:]


def test_it_documents_itself(shell: Any) -> None:
    page = shell.find_line_magic("vram").__doc__
    assert all(f"--{flag}" in page for flag in ("who", "free", "watch", "fit", "cells", "json"))
