"""Files that another program writes, cuts or takes away while they are read: never a mixture, always said."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import Rows, read_rows

ROW = {"prompt": "a", "completion": "b"}
LINE = json.dumps(ROW)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_parquet(n_rows: int) -> None:
    from pyarrow import Table, parquet

    parquet.write_table(Table.from_pylist([ROW] * n_rows), "rows.parquet", row_group_size=2000)


def changing(rows: Rows, change: Callable[[], object]) -> str:
    """What is said when the file changes after its first row was read."""
    reading = iter(rows)
    next(reading)
    change()
    with pytest.raises(DataError) as caught:
        list(reading)
    return str(caught.value)


def many(n: int) -> str:
    return (LINE + "\n") * n


def test_a_file_that_grows_while_it_is_read() -> None:
    path = Path("rows.jsonl")
    path.write_text(many(40_000))
    assert changing(read_rows("rows.jsonl"), lambda: path.write_text(many(90_000))) == (
        "rows.jsonl changed while it was read (1 MiB -> 3 MiB); run the cell again"
    )


def test_a_file_that_is_cut_while_it_is_read_is_not_called_broken() -> None:
    path = Path("rows.jsonl")
    path.write_text(many(40_000))
    assert changing(read_rows("rows.jsonl"), lambda: os.truncate(path, 900_007)) == (
        "rows.jsonl changed while it was read (1 MiB -> 879 KiB); run the cell again"
    )


def test_a_file_that_changes_between_two_reads() -> None:
    path = Path("rows.jsonl")
    path.write_text(many(3))
    rows = read_rows("rows.jsonl")
    assert len(list(rows)) == 3
    with path.open("a") as file:
        file.write(LINE)
    with pytest.raises(DataError, match=r"^rows.jsonl changed while it was read \(\+34 bytes\); run the cell again$"):
        next(iter(rows))
    rows = read_rows("rows.jsonl")
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    with pytest.raises(DataError, match=r"\(written anew, as large as before\)"):
        list(rows)


def test_a_file_that_is_replaced_while_it_is_read() -> None:
    Path("rows.csv").write_text("text\na\nb\n")
    Path("other.csv").write_text("text\na\nb\nc, and so on\n")
    assert changing(read_rows("rows.csv"), lambda: os.replace("other.csv", "rows.csv")) == (
        "rows.csv changed while it was read (+13 bytes); run the cell again"
    )


def test_a_parquet_file_that_changes_while_it_is_read() -> None:
    write_parquet(60_000)
    said = changing(read_rows("rows.parquet"), lambda: write_parquet(3))
    assert re.fullmatch(r"rows.parquet changed while it was read \(\d+ KiB -> 1 KiB\); run the cell again", said)


def test_a_file_that_disappears() -> None:
    Path("rows.jsonl").write_text(many(3))
    gone = "rows.jsonl is gone: it was there when reading began; put it back and run the cell again"
    rows = read_rows("rows.jsonl")
    assert changing(rows, lambda: Path("rows.jsonl").unlink()) == gone
    with pytest.raises(DataError, match=gone):
        list(rows)


def test_a_json_file_is_in_memory_once_it_was_read() -> None:
    Path("rows.json").write_text(json.dumps([ROW]))
    rows = read_rows("rows.json")
    Path("rows.json").unlink()
    assert [row for _, row in rows] == [ROW]
