"""Rows from what people have in a notebook, names that lead nowhere, and what is said about everything else."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import ACCEPTED, Rows, read_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "é🎉\u2028", "completion": "d"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, split=split)
    return str(caught.value)


def rows_of(source: Any, split: str = "train") -> list[Any]:
    """The rows; that they are numbered and can be read again is checked on the way."""
    rows = read_rows(source, split=split)
    first, second = list(rows), list(rows.read())
    assert repr(first) == repr(second)
    assert [number for number, _ in first] == list(range(1, len(first) + 1))
    assert rows.n_rows in (None, len(first))
    return [row for _, row in first]


def test_the_demo_rows() -> None:
    assert read_rows("demo").source == "demo (train)"
    assert len(rows_of("demo", split="eval")) == 16


def test_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "rows.jsonl").write_text("\n".join(LINES))
    assert rows_of("~/rows.jsonl") == ROWS
    assert said("~/other.jsonl") == "no such file: ~/other.jsonl; that folder has rows.jsonl"
    assert said("~nobody-of-that-name/x.jsonl").startswith("cannot read ~nobody-of-that-name/x.jsonl: Could not")


def test_a_missing_file() -> None:
    Path("data").mkdir()
    Path("data/support.jsonl").touch()
    Path("support.jsonl").touch()
    here = Path.cwd()
    assert said("suport.jsonl") == "no such file: suport.jsonl; this folder has support.jsonl"
    assert said("data/suport.jsonl") == "no such file: data/suport.jsonl; that folder has support.jsonl"
    assert said("support.json") == "no such file: support.json; this folder has support.jsonl"
    assert said("zzz.jsonl") == f"no such file: zzz.jsonl; looked in {here}"
    assert said("./zzz") == f"no such file: ./zzz; looked in {here}"
    assert said("dta/support.jsonl") == "no such file: dta/support.jsonl; the folder dta does not exist either"
    assert said("a/b/c") == "no such file: a/b/c; the folder a/b does not exist either"
    assert said("rows.csv").startswith("no such file: rows.csv; ")


@pytest.mark.parametrize("name", ['{"prompt": "a"}\n', "x" * 2000, "a\0b"])
def test_text_that_cannot_be_a_name(name: str) -> None:
    assert said(name) == f"expected a file or a data set's name, got text that begins {name[:40]!r}; {ACCEPTED}"


def test_a_name_that_is_too_long_for_a_file() -> None:
    assert said("x" * 400).startswith(f"cannot read {'x' * 400}: [Errno 36] File name too long")


def test_an_address() -> None:
    assert said("https://example.org/rows.jsonl") == (
        "https://example.org/rows.jsonl is an address; expected a file or a data set's name: download it first"
    )


SEVERAL: dict[str, Callable[[], Any]] = {
    "list": lambda: ROWS,
    "tuple": lambda: tuple(ROWS),
    "generator": lambda: (row for row in ROWS),
    "list_iterator": lambda: iter(ROWS),
    "map": lambda: map(dict, ROWS),
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_rows_in_memory(kind: str) -> None:
    assert rows_of(SEVERAL[kind]()) == ROWS
    once = "" if kind in ("list", "tuple") else " (an iterator, now in memory)"
    assert read_rows(SEVERAL[kind]()).source == f"{kind} of rows{once}"


def test_rows_that_were_read_already() -> None:
    rows = read_rows(ROWS)
    assert read_rows(rows) is rows
    assert repr(rows) == "Rows(list of rows: 2 rows)"
    assert repr(Rows(source="x", n_rows=None, read=rows.read)) == "Rows(x)"
    assert said(Rows(source="x", n_rows=0, read=lambda: iter(()))) == f"x holds no rows; {ACCEPTED}"


def test_a_list_that_grows_afterwards_stays_as_it_was_given() -> None:
    given = list(ROWS)
    rows = read_rows(given)
    given.append({"prompt": "later", "completion": "c"})
    assert [row for _, row in rows] == ROWS


def test_a_generator_is_used_up() -> None:
    rows = (row for row in ROWS)
    read_rows(rows)
    assert said(rows) == (
        "generator of rows (an iterator, now in memory) holds no rows; an iterator can be read only once: "
        f"give a list; {ACCEPTED}"
    )


EXPECTED = "expected a file, a list of dicts, a DataFrame or a Dataset"
WRONG_OBJECTS: list[tuple[Any, str]] = [
    ([], f"list of rows holds no rows; {ACCEPTED}"),
    ((), f"tuple of rows holds no rows; {ACCEPTED}"),
    (ROWS[0], f"got one dict; expected a list of dicts, one a row; {ACCEPTED}"),
    ({"prompt": ["a"], "completion": ["b"]}, f"got one dict; expected a list of dicts, one a row; {ACCEPTED}"),
    (["a.jsonl"], 'row 1 of the list is a str; expected a dict such as {"text": "..."}'),
    ([ROWS[0], None], "row 2 of the list is a NoneType; expected a dict"),
    ([[ROWS[0]]], "row 1 of the list is a list; expected a dict"),
    (3.5, f"cannot read rows from a float; {EXPECTED}"),
    (len, f"cannot read rows from a builtin_function_or_method; {EXPECTED}"),
]


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
    assert (rows_of(frame), read_rows(frame).source) == (ROWS, "DataFrame of 2 rows")
    nested = [{"messages": [{"role": "user", "content": "a"}]}]
    assert rows_of(pandas.DataFrame(nested)) == nested
    many = [{"prompt": str(i), "completion": "b"} for i in range(2500)]
    assert rows_of(pandas.DataFrame(many)) == many
    assert said(frame[:0]) == f"DataFrame of 0 rows holds no rows; {ACCEPTED}"
    assert said(frame["prompt"]) == 'row 1 of the Series is a str; expected a dict such as {"text": "..."}'
    frame.columns = ["prompt", "prompt"]
    assert said(frame) == "the DataFrame has a column twice: prompt, prompt; rename one"


def test_a_dataset() -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    assert (rows_of(dataset), read_rows(dataset).source) == (ROWS, "Dataset of 2 rows")
    assert rows_of(dataset.with_format("numpy")) == ROWS
    assert rows_of(dataset.select([1, 0])) == ROWS[::-1]
    many = [{"prompt": str(i), "completion": "b"} for i in range(2500)]
    assert rows_of(datasets.Dataset.from_list(many)) == many
    assert said(dataset.select([])) == f"Dataset of 0 rows holds no rows; {ACCEPTED}"


def test_an_iterable_dataset_is_read_as_it_comes_and_again() -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[int] = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(5):
            asked.append(i)
            yield {"prompt": str(i), "completion": "b"}

    given = datasets.IterableDataset.from_generator(rows)
    read = read_rows(given)
    assert (read.n_rows, read.source) == (None, "IterableDataset of rows")
    assert len(asked) < 5
    assert [row["prompt"] for _, row in read] == [row["prompt"] for _, row in read] == list("01234")
    assert said(datasets.IterableDataset.from_generator(lambda: iter(()))).startswith("IterableDataset of rows holds")


def test_an_arrow_table() -> None:
    pyarrow = pytest.importorskip("pyarrow")
    many = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(2500)]
    table = pyarrow.Table.from_pylist(many)
    assert (rows_of(table), read_rows(table).source) == (many, "Table of rows")
    assert said(table.slice(0, 0)) == f"Table of rows holds no rows; {ACCEPTED}"


def test_a_dataset_dict() -> None:
    datasets = pytest.importorskip("datasets")
    first, second = datasets.Dataset.from_list(ROWS[:1]), datasets.Dataset.from_list(ROWS[1:])
    both = datasets.DatasetDict({"train": first, "test": second})
    assert (rows_of(both), read_rows(both).source) == (ROWS[:1], "train of a DatasetDict")
    assert (rows_of(both, split="eval"), read_rows(both, split="eval").source) == (ROWS[1:], "test of a DatasetDict")
    both["validation"] = first
    assert read_rows(both, split="eval").source == "validation of a DatasetDict"
    other = datasets.DatasetDict({"train_sft": first, "extra": second})
    assert said(other) == 'the DatasetDict has no split "train"; it has train_sft, extra; give the rows of one of them'
    assert said(other, "eval") == (
        'the DatasetDict has no split "eval"; it has train_sft, extra; give the rows of one of them'
    )


def test_a_saved_dataset_is_a_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    first, second = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[1:])
    first.save_to_disk("one")
    assert (rows_of("one"), read_rows("one").source) == (ROWS, "one (Dataset of 2 rows)")
    datasets.DatasetDict({"train": first, "test": second}).save_to_disk("two")
    assert (rows_of("two", split="eval"), read_rows("two", split="eval").source) == (
        ROWS[1:], "two (test of a DatasetDict)",
    )  # fmt: skip
