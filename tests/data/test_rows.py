"""Rows from everything that people have, and what is said about everything else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import Rows, read_rows

NEED = 'rows need "messages", or "prompt" and "completion"'
ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "é🎉\u2028", "completion": "d"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, split=split)
    return str(caught.value)


def test_the_demo_rows() -> None:
    assert read_rows("demo").source == "demo (train)"
    assert len(read_rows("demo", split="eval").rows) == 16


@pytest.mark.parametrize(
    "content",
    [
        "\n".join(LINES),
        "\n".join(LINES) + "\n",
        "\r\n".join(LINES) + "\r\n",
        "\ufeff" + "\n".join(LINES),
        "\n\n" + "\n  \n\t\n".join(LINES) + "\n\n\n",
    ],
    ids=["no last line break", "plain", "CRLF", "byte order mark", "blank lines"],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.NDJSON"])
def test_a_jsonl_file(content: str, name: str) -> None:
    Path(name).write_bytes(content.encode())
    got = read_rows(name)
    assert list(got.rows) == ROWS
    assert got.source == name
    assert list(read_rows(Path(name)).rows) == ROWS
    assert list(read_rows(str(Path(name).absolute())).rows) == ROWS


def test_a_file_named_like_a_data_set_is_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("rows").write_text("\n".join(LINES))
    assert said("rows") == (
        "rows: only JSONL files are read, got no suffix; expected one JSON object a line, in a file named .jsonl"
    )


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES))
    assert list(read_rows("~/rows.jsonl").rows) == ROWS
    assert said("~/other.jsonl") == "no such file: ~/other.jsonl; that folder has rows.jsonl"
    assert said("~nobody-of-that-name/x.jsonl").startswith("cannot read ~nobody-of-that-name/x.jsonl: Could not")


def test_a_missing_file() -> None:
    Path("data").mkdir()
    Path("data/support.jsonl").touch()
    Path("support.jsonl").touch()
    here = Path.cwd()
    assert said("suport.jsonl") == "no such file: suport.jsonl; this folder has support.jsonl"
    assert said("data/suport.jsonl") == "no such file: data/suport.jsonl; that folder has support.jsonl"
    assert said("zzz.jsonl") == f"no such file: zzz.jsonl; looked in {here}"
    assert said("./zzz") == f"no such file: ./zzz; looked in {here}"
    assert said("dta/support.jsonl") == "no such file: dta/support.jsonl; the folder dta does not exist either"
    assert said("a/b/c") == "no such file: a/b/c; the folder a/b does not exist either"
    assert said("rows.csv").startswith("no such file: rows.csv; ")


def test_a_folder() -> None:
    Path("data").mkdir()
    assert said("data") == "data is a folder; give the file in it"
    Path("data/b.jsonl").touch()
    Path("data/a.jsonl").touch()
    assert said("data") == "data is a folder; give the file in it, for example data/a.jsonl"


@pytest.mark.parametrize(("suffix", "reader"), [("csv", "read_csv"), ("tsv", "read_table"), ("json", "read_json"),
                                                ("parquet", "read_parquet")])  # fmt: skip
def test_another_format_that_pandas_reads(suffix: str, reader: str) -> None:
    Path(f"rows.{suffix}").touch()
    assert said(f"rows.{suffix}") == (
        f"rows.{suffix}: only JSONL files are read, got .{suffix}; "
        f'expected rows = pandas.{reader}("rows.{suffix}") in a cell, then data = "$rows"'
    )


def test_another_format() -> None:
    Path("rows.txt").touch()
    assert said("rows.txt") == (
        "rows.txt: only JSONL files are read, got .txt; expected one JSON object a line, in a file named .jsonl"
    )


@pytest.mark.parametrize("name", ['{"prompt": "a"}\n', "x" * 2000, "a\0b"])
def test_text_that_cannot_be_a_name(name: str) -> None:
    assert said(name) == f"expected a file or a data set's name, got text that begins {name[:40]!r}; {NEED}"


def test_a_name_that_is_too_long_for_a_file() -> None:
    assert said("x" * 400).startswith(f"cannot read {'x' * 400}: [Errno 36] File name too long")


SEVERAL: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "iterator": lambda: iter(ROWS),
    "map": lambda: map(dict, ROWS),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_rows_in_memory(kind: str) -> None:
    assert list(read_rows(SEVERAL[kind]()).rows) == ROWS


def test_where_rows_came_from() -> None:
    assert read_rows(ROWS).source == "list of rows"
    assert read_rows(tuple(ROWS)).source == "tuple of rows"
    assert read_rows(row for row in ROWS).source == "generator of rows"


def test_rows_that_were_read_already() -> None:
    rows = Rows(rows=ROWS, source="x")
    assert read_rows(rows) is rows
    assert repr(rows) == "Rows(x: 2 rows)"
    assert said(Rows(rows=[], source="x")) == f"x holds no rows; {NEED}"


def test_a_generator_is_used_up() -> None:
    rows = (row for row in ROWS)
    read_rows(rows)
    assert said(rows) == (f"generator of rows holds no rows; an iterator can be read only once: give a list; {NEED}")


WRONG_OBJECTS: list[tuple[Any, str]] = [
    ([], f"list of rows holds no rows; {NEED}"),
    ((), f"tuple of rows holds no rows; {NEED}"),
    (ROWS[0], f"got one dict; expected a list of dicts, one a row; {NEED}"),
    ({"prompt": ["a"], "completion": ["b"]}, f"got one dict; expected a list of dicts, one a row; {NEED}"),
    (["a.jsonl"], f"row 1 of the list is a str; expected a dict; {NEED}"),
    ([ROWS[0], None], f"row 2 of the list is a NoneType; expected a dict; {NEED}"),
    ([[ROWS[0]]], f"row 1 of the list is a list; expected a dict; {NEED}"),
    (3.5, "cannot read rows from a float; expected a file, a list of dicts, a DataFrame or a Dataset"),
    (len, "cannot read rows from a builtin_function_or_method; "
          "expected a file, a list of dicts, a DataFrame or a Dataset"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "message"), WRONG_OBJECTS, ids=range(len(WRONG_OBJECTS)))
def test_objects_that_are_no_rows(source: Any, message: str) -> None:
    assert said(source) == message


def test_a_generator_that_fails_says_so_itself() -> None:
    def rows() -> Iterator[Any]:
        yield ROWS[0]
        raise KeyError("user's own")

    with pytest.raises(KeyError, match="user's own"):
        read_rows(rows())


def test_a_data_frame() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(ROWS, index=[7, 9])
    got = read_rows(frame)
    assert (list(got.rows), got.source) == (ROWS, "DataFrame of 2 rows")
    nested = pandas.DataFrame({"messages": [[{"role": "user", "content": "a"}]]})
    assert read_rows(nested).rows == [{"messages": [{"role": "user", "content": "a"}]}]
    assert said(frame[:0]) == f"DataFrame of 0 rows holds no rows; {NEED}"
    assert said(frame["prompt"]) == f"row 1 of the Series is a str; expected a dict; {NEED}"


def test_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    got = read_rows(dataset)
    assert (list(got.rows), got.source) == (ROWS, "Dataset of 2 rows")
    assert list(read_rows(dataset.with_format("numpy")).rows) == ROWS
    assert list(read_rows(dataset.to_iterable_dataset()).rows) == ROWS
    assert said(dataset.select([])) == f"Dataset of 0 rows holds no rows; {NEED}"


def test_a_dataset_dict() -> None:
    datasets = pytest.importorskip("datasets")
    first, second = datasets.Dataset.from_list(ROWS[:1]), datasets.Dataset.from_list(ROWS[1:])
    both = datasets.DatasetDict({"train": first, "test": second})
    assert (list(read_rows(both).rows), read_rows(both).source) == (ROWS[:1], "train of a DatasetDict")
    assert (list(read_rows(both, split="eval").rows), read_rows(both, split="eval").source) == (
        ROWS[1:], "test of a DatasetDict",
    )  # fmt: skip
    both["validation"] = first
    assert read_rows(both, split="eval").source == "validation of a DatasetDict"
    other = datasets.DatasetDict({"train_sft": first, "extra": second})
    assert said(other) == 'the DatasetDict has no split "train"; it has train_sft, extra; give the rows of one of them'
    assert said(other, "eval") == (
        'the DatasetDict has no split "eval"; it has train_sft, extra; give the rows of one of them'
    )
