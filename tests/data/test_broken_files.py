"""Files that cannot be read: the line, what is wrong with it and what was expected."""

import gzip
import json
import os
import random
from pathlib import Path

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import read_rows

A_LINE = "one row is one line of JSON; a file that is one list of objects is named .json"
QUOTES = 'a text with quotes or line breaks stands in "quotes", and a quote in it is doubled'
LATIN = '{"a": "b"}\n\n{"a": "\u00e9"}\n'.encode("latin-1")


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: str) -> str:
    """What is said, at the latest when all of it is read."""
    with pytest.raises(DataError) as caught:
        list(read_rows(source))
    return str(caught.value)


BROKEN_JSONL: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"prompt": "a"}\n\n{"prompt":', "line 3: not JSON: Expecting value (column 11)"),
    "cut off, with line break": (b'{"prompt": "a"}\n{"prompt": "b\n', "line 2: not JSON: Unterminated string starting "
                                 "at (column 12)"),
    "single quotes": (b"{'prompt': 'a'}", "line 1: not JSON: Expecting property name enclosed in double quotes "
                      "(column 2)"),
    "two objects": (b'{"a": 1} {"a": 2}', "line 1: not JSON: Extra data (column 10)"),
    "pretty printed": (b'{\n  "prompt": "a"\n}', "line 1: not JSON: Expecting property name enclosed in double quotes "
                       f"(column 2); {A_LINE}"),
    "an array over lines": (b'[\n{"prompt": "a"},\n]', f"line 1: not JSON: Expecting value (column 2); {A_LINE}"),
    "an array a line": (b'{"a": 1}\n["a", "b"]', f"line 2: expected a JSON object, got list; {A_LINE}"),
    "a text a line": (b'"a"', "line 1: expected a JSON object, got str"),
    "nothing a line": (b'{"a": 1}\nnull\n', "line 2: expected a JSON object, got NoneType"),
    "Latin-1": (LATIN, "line 3: not UTF-8 text (byte 0xE9, invalid continuation byte); save the file as UTF-8"),
    "UTF-16": ('{"a": "b"}'.encode("utf-16"), "line 1: not UTF-8 text (it is UTF-16); save the file as UTF-8"),
    "no text at all": (b"\x00\x80\x81", "line 1: not UTF-8 text (byte 0x80, invalid start byte); "
                       "save the file as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_JSONL)
def test_a_broken_jsonl_file(name: str) -> None:
    content, message = BROKEN_JSONL[name]
    Path("rows.jsonl").write_bytes(content)
    assert said("rows.jsonl") == f"rows.jsonl, {message}"
    Path("rows.jsonl.gz").write_bytes(gzip.compress(content))
    assert said("rows.jsonl.gz") == f"rows.jsonl.gz, {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1' + b"0" * 5000 + b"}", "line 1: not JSON: Exceeds the limit (4300 digits)"),
        (b'{"a": ' + b"[" * 100_000, "line 1: not JSON: maximum recursion depth exceeded"),
    ],
)
def test_numbers_and_brackets_without_end(content: bytes, message: str) -> None:
    Path("rows.jsonl").write_bytes(content)
    assert said("rows.jsonl").startswith(f"rows.jsonl, {message}")
    Path("rows.json").write_bytes(content)
    assert said("rows.json").startswith(f"rows.json: {message.removeprefix('line 1: ')}")


def test_a_row_far_in_the_file_is_named_by_its_line() -> None:
    row = '{"prompt": "a", "completion": "b"}\n'
    Path("rows.jsonl").write_text(row * 5000 + "{broken}\n" + row)
    assert said("rows.jsonl").startswith("rows.jsonl, line 5001: not JSON: Expecting property name")
    Path("rows.csv").write_text("prompt,completion\n" + "a,b\n" * 5000 + "c\n")
    assert said("rows.csv").startswith("rows.csv, line 5002: 1 value for 2 columns")


BROKEN_JSON: dict[str, tuple[str, str]] = {
    "cut off": ('[\n{"prompt": "a"},\n{"prompt"', "rows.json, line 3: not JSON: Expecting ':' delimiter (column 10)"),
    "a comma too many": ('[\n {"prompt": "a"},\n,]', "rows.json, line 3: not JSON: Expecting value (column 1)"),
    "JSON lines, the first broken": ('{"prompt": "a"\n{"prompt": "b"}\n',
                                     "rows.json, line 2: not JSON: Expecting ',' delimiter (column 1)"),
    "JSON lines, the second broken": ('{"prompt": "a"}\n{"prompt": "b"\n',
                                      "rows.json, line 2: not JSON: Expecting ',' delimiter (column 15)"),
    "a list of texts": ('["a", "b"]', "rows.json, row 1: expected an object, got str"),
    "a list with null": ('{"data": [{"text": "a"}, null]}', "rows.json, data, row 2: expected an object, got NoneType"),
    "a number": ("3", "rows.json is one int; expected a list of objects, one a row"),
    "no object's keys": ("{}", "rows.json is one object with the keys (none); expected a list of objects, one a row"),
    "settings": ('{"a": 1, "b": {}}', "rows.json is one object with the keys a, b; "
                 "expected a list of objects, one a row"),
    "splits": ('{"train": [{"text": "a"}], "test": [{"text": "b"}]}', "rows.json is one object that holds several "
               "lists (train, test); give the list of rows in a file of its own"),
    "columns": ('{"prompt": {"0": "a"}, "completion": {"0": "b"}}', "rows.json is one object of columns; "
                'let pandas write rows: to_json("rows.jsonl", orient="records", lines=True)'),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_JSON)
def test_a_broken_json_file(name: str) -> None:
    content, message = BROKEN_JSON[name]
    Path("rows.json").write_text(content)
    assert said("rows.json") == message


def test_a_json_file_in_another_encoding() -> None:
    Path("rows.json").write_bytes('[\n{"a": "\u00e9"}]'.encode("cp1252"))
    assert said("rows.json") == (
        "rows.json, line 2: not UTF-8 text (byte 0xE9, invalid continuation byte); save the file as UTF-8"
    )
    Path("rows.json").write_bytes(json.dumps([{"text": "a"}]).encode("utf-16"))
    assert said("rows.json") == "rows.json, line 1: not UTF-8 text (it is UTF-16); save the file as UTF-8"


def test_a_json_file_that_is_too_large_to_be_read_whole() -> None:
    with open("rows.json", "wb") as file:
        file.write(b"[\n")
        file.truncate((1 << 30) + 1)
    assert said("rows.json") == (
        "rows.json holds more than 1.0 GiB, and .json is read as a whole; "
        "write it as .jsonl, one object a line, which is read line by line"
    )


BROKEN_CSV: dict[str, tuple[bytes, str]] = {
    "a value too many": (b"prompt,completion\na,b\nc,d,e\n", 'line 3: 3 values for 2 columns (prompt, completion); '
                         'a text that holds "," stands in "quotes"'),
    "a value missing": (b"prompt;completion\n\na\n", 'line 3: 1 value for 2 columns (prompt, completion); '
                        'a text that holds ";" stands in "quotes"'),
    "a value too many for one column": (b"text\na, b\n", 'line 2: 2 values for 1 column (text); '
                                        'a text that holds "," stands in "quotes"'),
    "a quote that is not closed": (b'prompt,completion\na,b\nc,"d\ne,f\n', "line 3: not CSV: "
                                   f"a quote opens here and is never closed; {QUOTES}"),
    "text after a quote": (b'prompt,completion\n"a" she said,b\n',
                           "line 2: not CSV: ',' expected after '\"'; " + QUOTES),
    "the line breaks of an old Mac": (b"prompt,completion\ra,b\r", "line 1: not CSV: its lines end in a bare carriage "
                                      "return; save it with the line breaks of Unix or Windows"),
    "a column twice": (b"prompt,text, prompt\na,b,c\n", "line 1: the header names prompt twice; "
                       "each column has its own name"),
    "empty columns twice": (b"\nprompt,,\na,b,c\n", "line 2: the header names an empty column twice; "
                            "each column has its own name"),
    "Latin-1, from Excel": ("prompt;completion\na;b\ncaf\u00e9;d\n".encode("cp1252"),
                            "line 3: not UTF-8 text (byte 0xE9, invalid continuation byte); save the file as UTF-8"),
    "UTF-16, from Excel": ("prompt\tcompletion\na\tb\n".encode("utf-16"),
                           "line 1: not UTF-8 text (it is UTF-16); save the file as UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN_CSV)
def test_a_broken_csv_file(name: str) -> None:
    content, message = BROKEN_CSV[name]
    Path("rows.csv").write_bytes(content)
    assert said("rows.csv") == f"rows.csv, {message}"


def test_a_broken_tsv_file() -> None:
    Path("rows.tsv").write_text("prompt\tcompletion\na\tb\tc\n")
    assert said("rows.tsv") == (
        'rows.tsv, line 2: 3 values for 2 columns (prompt, completion); a text that holds a tab stands in "quotes"'
    )


def test_a_line_without_end() -> None:
    with open("rows.jsonl", "wb") as file:
        file.write(b'{"text": "a"}\n[')
        file.truncate(65 << 20)
    assert said("rows.jsonl") == "rows.jsonl, line 2: longer than 0.06 GiB; is this text?"


def test_a_broken_parquet_file() -> None:
    Path("rows.parquet").write_text("text\n" + "a\n" * 100)
    assert said("rows.parquet").startswith("rows.parquet: not a Parquet file that can be read: Parquet magic bytes not")
    from pyarrow import Table, parquet

    rows = [{"text": f"{i} {i * i}"} for i in range(3000)]
    parquet.write_table(Table.from_pylist(rows), "rows.parquet", row_group_size=1000, compression="gzip")
    content = bytearray(Path("rows.parquet").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = b"\xff" * 200
    Path("rows.parquet").write_bytes(bytes(content))
    assert said("rows.parquet").startswith(("cannot read rows.parquet: ", "rows.parquet: not a Parquet file that can"))


def test_a_broken_gzip_file() -> None:
    Path("rows.jsonl.gz").write_bytes(b'{"text": "a"}\n')
    assert said("rows.jsonl.gz") == "cannot read rows.jsonl.gz: Not a gzipped file (b'{\"')"
    whole = gzip.compress(b'{"text": "a"}\n' * 10_000)
    Path("rows.jsonl.gz").write_bytes(whole[:-50])
    assert said("rows.jsonl.gz") == (
        "cannot read rows.jsonl.gz: Compressed file ended before the end-of-stream marker was reached"
    )
    Path("rows.jsonl.gz").write_bytes(whole[:30] + b"\xff" * 20 + whole[50:])
    assert said("rows.jsonl.gz").startswith("cannot read rows.jsonl.gz: Error -3 while decompressing data")


@pytest.mark.skipif(not os.path.exists("/proc/self/mem"), reason="needs a file that opens and then cannot be read")
def test_a_file_that_may_not_be_read() -> None:
    Path("rows.jsonl").symlink_to("/proc/self/mem")
    assert said("rows.jsonl") == "cannot read rows.jsonl: [Errno 5] Input/output error"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_whatever_bytes_are_damaged_is_said_as_an_error_of_the_data(name: str) -> None:
    from pyarrow import Table, parquet

    rows = [{"prompt": f"é {i}", "completion": 'a, "b"'} for i in range(20)]
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    parquet.write_table(Table.from_pylist(rows), "whole.parquet")
    whole = {
        "rows.jsonl": lines,
        "rows.json": json.dumps({"data": rows}, indent=1).encode(),
        "rows.csv": b"prompt,completion\n" + 'é,"a, ""b"""\n'.encode() * 20,
        "rows.parquet": Path("whole.parquet").read_bytes(),
        "rows.jsonl.gz": gzip.compress(lines),
    }[name]
    numbers, refused = random.Random(0), 0
    for _ in range(100):
        damaged, at = bytearray(whole), numbers.randrange(len(whole))
        damaged[at : at + numbers.choice([0, 1, 1, 40])] = numbers.choice([b"", b'"', b"\n", b"\r", b"{", b"\x00\xff"])
        Path(name).write_bytes(damaged)
        try:
            list(read_rows(name))
        except DataError:
            refused += 1
    assert refused > 10
