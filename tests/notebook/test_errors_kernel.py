"""Each error as a person meets it: in a real kernel, the installed one and Colab's, typed as a beginner types it.

A few lines that say what to do, nothing of the libraries beside them, and an error for whoever runs the notebook.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import mounts
from tests.hub.hub_server import BAD_TOKEN, closed_address, hub_server
from tests.notebook.kernels import OLD, Kernel, Said, folder_or_skip

MOST_LINES = 8
# What the live view shows while it looks, and once it failed.
VIEW = re.compile(r"run1: (looking at model, data and machine|failed) · \d+ s")
SIGNS, UNKNOWN = "  %%finetune  ", "  %%finetune  unrecognized arguments: "
ONE, CELL = "ConfigError: 1 problem in this cell", "ConfigError: {} problems in this cell"
LINE = "ConfigError: 1 problem in the {} line"
TOP = LINE.format("%%finetune")


# Releases of the hub's client differ in where they read the address.
ELSEWHERE = """
from huggingface_hub import constants, file_download
kept = constants.ENDPOINT, constants.HUGGINGFACE_CO_URL_TEMPLATE
def point(endpoint, template):
    constants.ENDPOINT = endpoint
    constants.HUGGINGFACE_CO_URL_TEMPLATE = file_download.HUGGINGFACE_CO_URL_TEMPLATE = template
point("{address}", "{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
"""
BACK = "point(*kept)"


def cell(*lines: str, flags: str = "") -> str:
    """A cell that is right but for these lines."""
    return f"%%finetune run1{flags}\n" + "\n".join(('model = "tiny"', *lines))


# cell: what it shows; the rest of a long line may be left out, and then ends in three dots.
WRONG: dict[str, list[str]] = {
    # the magic's line
    "%%finetune run1 --plann\n": [TOP, UNKNOWN + "--plann; did you mean --plan?"],
    "%%finetune run1 —plan\n": [TOP, UNKNOWN + "—plan; did you mean --plan?"],
    "%%finetune run1 --plan=yes\n": [TOP, SIGNS + "argument --plan: ignored explicit argument 'yes'; ..."],
    "%%finetune my-run\n": [TOP, SIGNS + "'my-run' cannot be a variable's name; write %%finetune my_run"],
    '%%finetune "run1"\n': [TOP, SIGNS + "'\"run1\"' cannot be a variable's name; write %%finetune run1"],
    "%%finetune my run\n": [TOP, UNKNOWN + "run; a run's name is one word"],
    '%%finetune run1 "\n': [TOP, SIGNS + "a quote on this line is never closed; close it, or leave it out"],
    '%%finetune run1 model="tiny"\n': [
        TOP, UNKNOWN + 'model="tiny"; options go on the lines below, one a line',
    ],
    "%vram who": [LINE.format("%vram"), "  %vram  unrecognized arguments: who; did you mean --who?"],
    "%vram --fit tiny max_len=3": [
        "ConfigError: 1 problem in %vram --fit", "  max_len  unknown key; did you mean max_length?",
    ],
    # where the magic stands
    '%finetune run1\nmodel = "tiny"': [
        LINE.format("%finetune"), "  %finetune  one % is for a line, and this is for a cell; write %%finetune run1",
    ],
    'x = 1\n%%finetune run1\nmodel = "tiny"': [
        TOP, SIGNS + "stands below code; put what is above it into a cell of its own",
    ],
    "%%vram --who": [
        LINE.format("%%vram"), "  %%vram  two % are for a cell, and this is for a line; write %vram --who; ...",
    ],
    "# mine\n\n" + cell("data = 3"): [ONE, "  line 5  data  expected a file, a data set's name or rows, got 3"],
    cell('data = "rows.jsonl"', "%vram"): [ONE, "  line 4  %vram  is no option; commands go into a cell of their own"],
    # nothing below it
    "%%finetune run1": [ONE, '  it is empty; start with model = "demo" and data = "demo"'],
    "# mine\n%%finetune run1\n": [ONE, '  it is empty; start with model = "demo" and data = "demo"'],
    # what is written
    cell("data = $rows"): [ONE, '  line 3  data  text needs quotes; write data = "$rows"'],
    cell('data = "$rowz"'): [ONE, "  line 3  data  this notebook has no object rowz; did you mean $rows?"],
    cell('data = "{rows}"'): [
        'DataError: "{rows}" is neither a file here nor a name that the hub takes (owner/name); for an object of the '
        'notebook write "$rows"',
    ],
    cell('data = "rows.jsonl"', "lora_rank = 8", "lr = 2e-4"): [
        CELL.format(2),
        "  line 4  lora_rank  unknown key; did you mean lora_r?",
        "  line 5  lr         unknown key; did you mean learning_rate?",
    ],
    '%%finetune run1\nmodel = AutoModel("x")\ndata = rows[:10]\nimport torch': [
        CELL.format(3), "  line 2  model         is Python, which is not run here; ...",
        "  line 3  data          is Python, which is not run here; ...",
        '  line 4  import torch  expected key = value; for example model = "demo"',
    ],
    '%%finetune run1\n{"model": "tiny", "data": "rows.jsonl"}': [
        ONE, "  line 2  {  a Python dict or JSON is no TOML; write one key = value a line, ...",
    ],
    "%%finetune run1\nmodel: tiny\ndata: rows.jsonl": [
        CELL.format(2),
        '  line 2  model  expected one = between key and value, got :; write model = "tiny"',
        '  line 3  data   expected one = between key and value, got :; write data = "rows.jsonl"',
    ],
    "%%finetune run1\nmodel = “tiny”\ndata = 'rows.jsonl'": [
        ONE, "  line 2  model  has curly quotes; use straight ones, \" or '",
    ],
    "%%finetune run1\n\tmodel = 'tiny'\n\tdata = 'rows.jsonl'\n\tpacking = True": [
        ONE, "  line 4  packing  TOML has only true and false; write true instead of True",
    ],
    cell(r'data = "C:\Users\new\rows.jsonl"'): [
        ONE,
        r"""  line 3  data  in "...", a backslash begins a special character; write data = 'C:\Users\new\rows.jsonl'""",
    ],
    cell(r"data = 'sub\rows.jsonl'"): [r"DataError: no such file: sub\rows.jsonl; write sub/rows.jsonl"],
    cell('data = [{"text": "a"}]'): [
        ONE, '  line 3  data  a list of dicts is Python; name it in a cell above, and write data = "$name"',
    ],
    cell('data = "$one"'): ["DataError: got one dict; expected a list of dicts, one a row; rows need ..."],
    # of the wrong kind
    cell('data = "rows.jsonl"', 'vram_gib = "14"', "dtype = bfloat16", "max_steps = 1.5"): [
        CELL.format(3),
        '  line 4  vram_gib   expected a number above 0, got "14"; leave out the quotes',
        '  line 5  dtype      text needs quotes; write dtype = "bfloat16"',
        "  line 6  max_steps  expected a whole number of at least 1, or -1 for whole epochs, got 1.5",
    ],
    cell('data = "rows.jsonl"', "[lora]", "r = 8"): [
        ONE, "  line 4  lora  unknown table; there are [trl] and [peft]; other options stand above",
    ],
    cell('data = "rows.jsonl"', "[trl]", 'logging_steps = "often"', "lr = 3", flags=" --plan"): [
        CELL.format(2),
        '  line 5  trl.logging_steps  expected a number, got "often"',
        "  line 6  trl.lr             unknown key; did you mean learning_rate at the top level, above any [table]?",
    ],
    cell('data = "rows.jsonl"', "", 'target_modules = ["q"]'): [
        ONE, "  line 5  target_modules  this model has no linear named q; it has q_proj, ...",
    ],
    # what is not there
    cell('data = "row.jsonl"'): ["DataError: no such file: row.jsonl; this folder has rows.jsonl"],
    cell('data = "empty"'): ["DataError: empty is a folder without data files (.jsonl, .json, .csv, .tsv or .parquet)"],
    '%%finetune run1\nmodel = "empty"\ndata = "rows.jsonl"': [
        "ModelError: empty is a folder without config.json; a model's folder has one",
    ],
    '%%finetune run1\nmodel = "Demo"\ndata = "rows.jsonl"': [
        'ModelError: there is no model Demo; did you mean "demo"?',
    ],
    '%%finetune run1\nmodel = "org/missing"\ndata = "rows.jsonl"': [
        "ModelError: the hub has no model org/missing; check the spelling (owner/name), or it is private: ...",
    ],
    '%%finetune run1\nmodel = "org/gated"\ndata = "rows.jsonl"': [
        "ModelError: org/gated is gated; accept its licence at https://huggingface.co/org/gated, then ...",
    ],
    cell('data = "org/gated"'): [
        "DataError: org/gated is gated; accept its licence at https://huggingface.co/datasets/org/gated, ...",
    ],
    cell('data = "rows.jsonl"', 'output_dir = "rows.jsonl"'): [
        ONE, "  line 4  output_dir  rows.jsonl cannot be made: ...",
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=["installed", "colab"])
def kernel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_rows: list[Any]
) -> Iterator[Kernel]:
    """A kernel with the extension, some rows, and a hub on this machine."""
    packages = folder_or_skip(OLD) if request.param == "colab" else None
    folder = tmp_path_factory.mktemp(f"errors-{request.param}")
    (folder / "tiny").symlink_to(tiny_folder)
    for name in ("empty", "sub", "small"):
        (folder / name).mkdir()
    for name in ("rows.jsonl", "sub/rows.jsonl"):
        (folder / name).write_text("\n".join(map(json.dumps, tiny_rows)))
    with pytest.MonkeyPatch.context() as patch, hub_server(tiny_folder) as address:
        for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
            patch.delenv(variable, raising=False)
        patch.setenv("HF_ENDPOINT", address)
        patch.setenv("HF_HOME", str(folder / "hf"))
        with Kernel(folder, packages) as kernel:
            said = kernel.run('%load_ext nbqlora\nrows, one = [], {"text": "a"}\nimport os; print(os.getcwd())')
            assert said.error == "", said
            yield kernel


def seen(said: Said) -> list[str]:
    """The lines of an error, which is one for everybody and stands alone but for the view."""
    assert said.status == "error" and said.error, said
    lines = "\n".join(said.shown).split("\n")
    assert len(lines) <= MOST_LINES, lines
    assert not re.search(r"Traceback|During handling|^\s*File ", "\n".join(lines), re.MULTILINE)
    beside = [line for line in said.text.splitlines() if line.strip() and not VIEW.fullmatch(line)]
    assert beside == [], "something else stands in the cell"
    return lines


def is_like(line: str, wanted: str) -> bool:
    return line.startswith(wanted[:-3]) if wanted.endswith("...") else line == wanted


def test_each_mistake_is_a_few_lines_that_say_what_to_do(kernel: Kernel) -> None:
    wrong = []
    for code, wanted in WRONG.items():
        lines = seen(kernel.run(code))
        if len(lines) != len(wanted) or not all(map(is_like, lines, wanted)):
            wrong.append((code, lines, wanted))
    assert wrong == []
    assert kernel.run("print('run1' in dir())").text.strip() == "False"


def test_a_token_that_is_refused_is_not_shown(kernel: Kernel) -> None:
    kernel.run(f'os.environ["HF_TOKEN"] = "{BAD_TOKEN}"')
    said = kernel.run('%%finetune run1 --traceback\nmodel = "org/tiny"\ndata = "rows.jsonl"')
    kernel.run('del os.environ["HF_TOKEN"]')
    assert said.error.startswith("ModelError: the hub refuses the token of the variable HF_TOKEN")
    assert BAD_TOKEN not in str(said)


def test_traceback_gives_the_frames_down_to_the_place(kernel: Kernel) -> None:
    said = kernel.run(cell('data = "row.jsonl"', flags=" --traceback"))
    lines = "\n".join(said.shown).split("\n")
    assert lines[0].startswith("Traceback") and lines[-1] == said.error
    assert said.error == "DataError: no such file: row.jsonl; this folder has rows.jsonl"
    assert [sum(f"in {name}\n" in "\n".join(lines) for name in ("finetune", "_read_named"))] == [2]
    assert all(lines), "no empty lines between"


def test_what_does_not_fit_says_what_would(kernel: Kernel) -> None:
    said = kernel.run(cell('data = "rows.jsonl"', "vram_gib = 0.01"))
    assert said.status == "error" and said.error.startswith("DoesNotFitError: tiny needs 0.")
    lines = "\n".join(said.shown).split("\n")
    assert 2 <= len(lines) <= MOST_LINES and lines[-1] == "  vram_gib = 0.01 is your own limit"
    assert "Traceback" not in said.text and "Warning" not in said.text


def test_a_disk_without_room_is_told_before_anything_is_loaded(kernel: Kernel) -> None:
    small = Path(kernel.run("print(os.getcwd())").text.strip()) / "small"
    with mounts.mounted(small, "1m"):
        (line,) = seen(kernel.run(cell('data = "rows.jsonl"', 'output_dir = "small/run1"')))
    assert line.startswith("OutOfDiskError: this run writes up to 0.06 GiB (") and "name a folder there" in line


def test_without_a_network_the_address_and_the_way_out_are_named(kernel: Kernel) -> None:
    address = closed_address()
    kernel.run(ELSEWHERE.format(address=address))
    (model,) = seen(kernel.run('%%finetune run1\nmodel = "org/other"\ndata = "rows.jsonl"'))
    (data,) = seen(kernel.run(cell('data = "org/other"')))
    kernel.run(BACK)
    cannot = f"org/other is not in the cache, and {address} cannot be reached (it refuses the connection); check the "
    cannot += "network; files of this machine work without: "
    assert (model, data) == (f'ModelError: {cannot}model = "path/to/it"', f'DataError: {cannot}data = "path/to/it"')


def test_a_hub_that_is_busy_is_waited_for_in_one_line(kernel: Kernel) -> None:
    kernel.run(
        "from huggingface_hub.utils import _http\nkept, _http.time.sleep = _http.time.sleep, lambda seconds: None"
    )
    said = kernel.run('%%finetune run1\nmodel = "org/busy"\ndata = "rows.jsonl"')
    kernel.run("_http.time.sleep = kept")
    assert said.error.endswith("cannot give org/busy now: it answers 503; try again in a minute")
    assert "Retrying" not in said.text and "it answers 503, and is asked again" in said.text


def test_comments_above_the_magic_are_no_mistake(kernel: Kernel) -> None:
    said = kernel.run("# the first try\n\n" + cell('data = "rows.jsonl"', "max_steps = 1", flags=" --plan"))
    assert (said.error, said.status) == ("", "ok") and "plan  tiny" in said.text


def test_loading_the_extension_twice_changes_nothing(kernel: Kernel) -> None:
    kernel.run("%reload_ext nbqlora")
    count = "print([getattr(f, '__name__', '') for f in get_ipython().input_transformers_cleanup].count('magic_first'))"
    assert kernel.run(count).text.strip() == "1"
    assert "--plan" in kernel.run("print(get_ipython().find_cell_magic('finetune').__doc__)").text


def test_text_that_holds_a_magic_stays_text(kernel: Kernel) -> None:
    said = kernel.run('text = """\n%%finetune run1\n"""\nprint(text)')
    assert said.error == "" and said.text.strip() == "%%finetune run1"
