"""Every kind of file, and folders of them."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import ACCEPTED, read_rows

ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "é🎉\u2028", "completion": 'one, "two";\tthree\r\nfour'},
    {"prompt": "c", "completion": "d"},
]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]
READABLE = ".jsonl, .json, .csv, .tsv or .parquet"


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(source, split=split))
    return str(caught.value)


def rows_of(source: Any, split: str = "train") -> list[Any]:
    rows = read_rows(source, split=split)
    first = list(rows)
    assert first == list(rows.read())
    assert rows.n_rows in (None, len(first))
    return [row for _, row in first]


def write_csv(name: str, *, delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL, encoding: str = "utf-8") -> None:
    with open(name, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=delimiter, quoting=quoting)
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(name: str, rows: list[Any] = ROWS, **options: Any) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist(rows), name, **options)


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
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.NDJSON", "rows.json"])
def test_json_lines_under_any_name(content: str, name: str) -> None:
    Path(name).write_bytes(content.encode())
    assert rows_of(name) == rows_of(Path(name)) == rows_of(str(Path(name).absolute())) == ROWS
    got = read_rows(name)
    assert (got.source, got.n_rows, got.unit) == (name, None, "line")


def test_rows_of_text_files_are_numbered_by_their_lines() -> None:
    Path("rows.jsonl").write_text(f"\n{LINES[0]}\n\n{LINES[2]}\n")
    assert [number for number, _ in read_rows("rows.jsonl")] == [2, 4]
    Path("rows.csv").write_text('\nprompt,completion\n\na,"one\ntwo\n\nthree"\nb,c\n\n,d\n')
    assert list(read_rows("rows.csv")) == [
        (4, {"prompt": "a", "completion": "one\ntwo\n\nthree"}),
        (8, {"prompt": "b", "completion": "c"}),
        (10, {"prompt": None, "completion": "d"}),
    ]
    assert read_rows("rows.csv").unit == "line"


JSON: dict[str, Callable[[], str]] = {
    "a list": lambda: json.dumps(ROWS),
    "pretty printed": lambda: "\ufeff" + json.dumps(ROWS, indent=2, ensure_ascii=False),
    "a list over lines": lambda: "[" + ",\n".join(LINES) + "]\n",
    "in a frame": lambda: json.dumps({"version": "1.0", "data": ROWS}),
    "in a pretty frame": lambda: json.dumps({"data": ROWS, "n": 3}, indent=1),
}


@pytest.mark.parametrize("kind", JSON)
def test_a_json_file(kind: str) -> None:
    Path("rows.json").write_text(JSON[kind](), encoding="utf-8")
    assert rows_of("rows.json") == ROWS
    assert [number for number, _ in read_rows("rows.json")] == [1, 2, 3]
    assert (read_rows("rows.json").n_rows, read_rows("rows.json").unit) == (3, "row")


@pytest.mark.parametrize("row", [ROWS[0], {"messages": [{"role": "user", "content": "a"}]}, {"text": "a"}])
def test_a_json_file_of_one_row(row: Any) -> None:
    Path("rows.json").write_text(json.dumps(row, indent=1))
    assert rows_of("rows.json") == [row]


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(("name", "delimiter"), [("rows.csv", ","), ("rows.CSV", ";"), ("rows.csv", "\t"),
                                                 ("rows.csv", "|"), ("rows.tsv", "\t")])  # fmt: skip
def test_a_csv_file(name: str, delimiter: str, encoding: str, quoting: int) -> None:
    write_csv(name, delimiter=delimiter, encoding=encoding, quoting=quoting)
    assert rows_of(name) == ROWS


def test_a_csv_file_of_one_column_and_one_that_pandas_wrote() -> None:
    Path("rows.csv").write_text('text\n"a, b"\nc; d\n\n"e\n\nf"\n')
    assert rows_of("rows.csv") == [{"text": "a, b"}, {"text": "c; d"}, {"text": "e\n\nf"}]
    pandas = pytest.importorskip("pandas")
    pandas.DataFrame([*ROWS, {"prompt": None, "completion": "d"}]).to_csv("rows.csv")
    written = [*ROWS, {"prompt": None, "completion": "d"}]
    assert rows_of("rows.csv") == [{"": str(i), **row} for i, row in enumerate(written)]


def test_a_long_text_in_a_csv_file_leaves_csvs_own_limit_as_it_was() -> None:
    before = csv.field_size_limit()
    Path("rows.csv").write_text("text\n" + "long " * 100_000 + "\n")
    assert rows_of("rows.csv") == [{"text": "long " * 100_000}]
    assert csv.field_size_limit() == before < 500_000


def test_a_parquet_file_in_row_groups() -> None:
    rows = [{"messages": [{"role": "user", "content": str(i)}], "tools": None} for i in range(2500)]
    write_parquet("rows.parquet", rows, row_group_size=1000)
    assert rows_of("rows.parquet") == rows
    assert (read_rows("rows.parquet").n_rows, read_rows("rows.parquet").unit) == (2500, "row")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv"])
def test_text_files_that_are_packed(name: str) -> None:
    write_csv("rows.csv") if name == "rows.csv" else Path(name).write_text("\n".join(LINES), encoding="utf-8")
    Path(f"{name}.gz").write_bytes(gzip.compress(Path(name).read_bytes()))
    assert rows_of(f"{name}.gz") == ROWS
    assert read_rows(f"{name}.gz").source == f"{name}.gz"


NO_KIND = {
    "rows": f"rows: got no suffix, expected {READABLE}",
    "rows.txt": f"rows.txt: got .txt, expected {READABLE}; "
                'write each text as {"text": "..."} on a line of a .jsonl file',
    "rows.xlsx": f"rows.xlsx: got .xlsx, expected {READABLE}; "
                 'rows = pandas.read_excel("rows.xlsx") in a cell, then data = "$rows"',
    "rows.zip": f"rows.zip: got .zip, expected {READABLE}; unpack it first",
    "rows.parquet.gz": f"rows.parquet.gz: got .gz, expected {READABLE}",
    "rows.arrow": f"rows.arrow: got .arrow, expected {READABLE}",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_KIND)
def test_a_file_of_another_kind(name: str) -> None:
    Path(name).write_text("\n".join(LINES))
    assert said(name) == NO_KIND[name]


def test_a_folder_of_one_kind_of_files() -> None:
    Path("data").mkdir()
    Path("data/README.md").write_text("about")
    Path("data/.hidden.csv").write_text("x")
    write_parquet("data/part-1.parquet", ROWS[2:])
    write_parquet("data/part-0.parquet", ROWS[:2])
    assert rows_of("data") == ROWS
    got = read_rows("data")
    assert (got.source, got.n_rows, [n for n, _ in got]) == ("data (2 .parquet files)", 3, [1, 2, 3])
    Path("data/part-0.parquet").unlink()
    assert (rows_of("data"), read_rows("data").source) == (ROWS[2:], "data/part-1.parquet")


def test_the_files_of_a_folder_are_those_of_the_split() -> None:
    Path("data").mkdir()
    for name, row in zip(("train-1.jsonl", "train-2.jsonl", "test.jsonl"), LINES, strict=True):
        Path("data", name).write_text(row)
    assert (rows_of("data"), read_rows("data").source) == (ROWS[:2], "data (2 .jsonl files)")
    assert (rows_of("data", "eval"), read_rows("data", split="eval").source) == (ROWS[2:], "data/test.jsonl")
    Path("data/rows-validation.jsonl").write_text(LINES[0])
    assert rows_of("data", "eval") == ROWS[:1]
    Path("data/rows-validation.jsonl").unlink()
    Path("data/test.jsonl").unlink()
    assert said("data", "eval") == (
        "data has no file for evaluation (named eval, validation or test); it has train-1.jsonl"
    )


def test_folders_that_cannot_be_read() -> None:
    Path("data/deeper").mkdir(parents=True)
    assert said("data") == f"data is a folder without data files ({READABLE})"
    Path("data/deeper/rows.jsonl").write_text("\n".join(LINES))
    assert said("data") == f"data is a folder without data files ({READABLE}); there are some in data/deeper"
    Path("data/a.jsonl").write_text(LINES[0])
    Path("data/b.csv").write_text("text\na")
    assert said("data") == "data holds .csv and .jsonl files; give one of them, for example data/a.jsonl"
    Path("data/b.csv").unlink()
    Path("data/b.jsonl").write_text('{"a": 1}\n{')
    assert said("data").startswith("data/b.jsonl, line 2: not JSON")


def test_empty_files_of_every_kind() -> None:
    for name in ("rows.jsonl", "rows.json", "rows.csv", "rows.tsv"):
        for content in (b"", b"\n\n", b"\xef\xbb\xbf\r\n"):
            Path(name).write_bytes(content)
            assert said(name) == f"{name} holds no rows; {ACCEPTED}"
    Path("rows.csv").write_text("prompt,completion\n\n")
    assert said("rows.csv") == f"rows.csv holds no rows; {ACCEPTED}"
    for content in ("[]", '{"data": []}'):
        Path("rows.json").write_text(content)
        assert said("rows.json") == f"rows.json holds no rows; {ACCEPTED}"
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pydict({"text": []}), "rows.parquet")
    assert said("rows.parquet") == f"rows.parquet holds no rows; {ACCEPTED}"
