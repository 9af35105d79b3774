"""Errors: short in a notebook, real everywhere, and each a standard type too."""

import copy
import pickle
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core import errors
from nbqlora.core.errors import ConfigError, DataError, NbqloraError, Problem

STANDARD = {
    "ConfigError": ValueError,
    "DataError": ValueError,
    "ModelError": OSError,
    "DemoModelError": OSError,
    "DeviceError": RuntimeError,
    "DoesNotFitError": MemoryError,
    "MemoryExhaustedError": MemoryError,
    "DiskError": OSError,
    "OutOfDiskError": OSError,
    "PublishError": OSError,
    "TrainingError": RuntimeError,
    "LostRankError": RuntimeError,
    "NonFiniteLossError": ArithmeticError,
    "InterruptedRunError": KeyboardInterrupt,
    "RunError": RuntimeError,
}
PROBLEMS = (
    Problem(key="data", message="no such file: data/suport.jsonl", hint="this folder has support.jsonl", line=3),
    Problem(key="lora_rank", message="unknown key", hint="did you mean lora_r?", line=15),
    Problem(key="model", message="is missing"),
)


def test_the_whole_tree_is_listed_here() -> None:
    kinds = {n: k for n, k in vars(errors).items() if isinstance(k, type) and issubclass(k, NbqloraError)}
    assert set(kinds) == {"NbqloraError", *STANDARD}


@pytest.mark.parametrize(("name", "standard"), STANDARD.items())
def test_each_error_is_also_its_standard_type(name: str, standard: type[BaseException]) -> None:
    kind = getattr(errors, name)
    error = kind(PROBLEMS) if kind is ConfigError else kind("what was given\nwhat to do")
    with pytest.raises(standard) as caught:
        raise error
    assert isinstance(caught.value, NbqloraError)
    copied = pickle.loads(pickle.dumps(error))
    assert (type(copied), str(copied)) == (kind, str(error))


def test_columns_are_aligned() -> None:
    assert str(ConfigError(PROBLEMS, "this cell")) == (
        "3 problems in this cell\n"
        "  line 3   data       no such file: data/suport.jsonl; this folder has support.jsonl\n"
        "  line 15  lora_rank  unknown key; did you mean lora_r?\n"
        "           model      is missing"
    )


def test_columns_that_are_empty_take_no_room() -> None:
    no_lines = [Problem(key=p.key, message=p.message) for p in PROBLEMS]
    assert str(ConfigError(no_lines)) == (
        "3 problems in the options\n"
        "  data       no such file: data/suport.jsonl\n"
        "  lora_rank  unknown key\n"
        "  model      is missing"
    )
    assert str(ConfigError([Problem(key="", message="it is empty")], "a.toml")) == "1 problem in a.toml\n  it is empty"


def test_a_config_error_keeps_its_problems_when_copied() -> None:
    error = ConfigError(PROBLEMS, "this cell")
    for again in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (again.problems, again.source, str(again)) == (PROBLEMS, "this cell", str(error))


def test_rendered_lines() -> None:
    lines = ConfigError(PROBLEMS, "this cell")._render_traceback_()
    assert lines[0] == "ConfigError: 3 problems in this cell"
    assert lines[1].startswith("  line 3   data       no such file")
    assert len(lines) == 4
    assert DataError("rows.jsonl holds no rows")._render_traceback_() == ["DataError: rows.jsonl holds no rows"]


def test_the_whole_traceback_on_request() -> None:
    try:
        raise DataError("rows.jsonl holds no rows") from KeyError("x")
    except DataError as error:
        error.show_traceback = True
        text = "".join(error._render_traceback_())
    assert "KeyError: 'x'" in text
    assert "test_the_whole_traceback_on_request" in text
    assert not DataError("another").show_traceback


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    main, hook = sys.modules["__main__"], sys.excepthook
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    shell = InteractiveShell.instance(config=config)
    yield shell
    shell.reset(new_session=False)
    InteractiveShell.clear_instance()
    sys.modules["__main__"], sys.excepthook = main, hook
    for name in ("last_type", "last_value", "last_traceback", "last_exc"):
        monkeypatch.delattr(sys, name, raising=False)


CELL = """
from nbqlora.core.config import validate
from nbqlora.core.request import parse_toml
def deep(n):
    if n:
        return deep(n - 1)
    request = parse_toml('model = "demo"\\nlora_rank = 8\\ndata = rows', first_line=2, source="this cell", namespace={})
    return validate(request, table_fields=lambda table: {})
deep(5)
"""


def test_ipython_prints_the_short_lines_and_the_error_is_real(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = shell.run_cell(CELL)
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n").split("\n") == [
        "ConfigError: 2 problems in this cell",
        "  line 3  lora_rank  unknown key; did you mean lora_r?",
        '  line 4  data       text needs quotes; write data = "rows"',
    ]
    assert printed.err == ""
    assert not result.success
    assert isinstance(result.error_in_exec, ConfigError)
    assert isinstance(result.error_in_exec, ValueError)
    assert [p.line for p in result.error_in_exec.problems] == [3, 4]
    with pytest.raises(ConfigError):
        result.raise_error()


def test_a_cell_can_catch_it_and_a_chained_error_stays_short(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from nbqlora.core.errors import DataError\ntry:\n    1 / 0\nexcept Exception as e:\n    "
    assert shell.run_cell(code + "try:\n        raise DataError('a\\n  b')\n    except ValueError: pass").success
    shell.run_cell(code + "raise DataError('a\\n  b') from e")
    assert capsys.readouterr().out == "DataError: a\n  b\n"


def test_ipython_prints_everything_on_request(shell: Any, capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("from nbqlora.core.errors import DataError\ne = DataError('a')\ne.show_traceback = True\nraise e")
    printed = capsys.readouterr().out
    assert "Traceback (most recent call last)" in printed
    assert printed.rstrip().endswith("DataError: a")
