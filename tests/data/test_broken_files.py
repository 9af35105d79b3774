"""JSONL files that cannot be read: the line, what is wrong with it and what was expected."""

from pathlib import Path

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import read_rows

NEED = 'rows need "messages", or "prompt" and "completion"'


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: str) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source)
    return str(caught.value)


BROKEN: dict[str, tuple[bytes, str]] = {
    "cut off": (b'{"prompt": "a"}\n\n{"prompt": ', "line 3: not JSON: Expecting value (column 12)"),
    "single quotes": (b"{'prompt': 'a'}", "line 1: not JSON: Expecting property name enclosed in double quotes "
                      "(column 2)"),
    "two objects": (b'{"a": 1} {"a": 2}', "line 1: not JSON: Extra data (column 10)"),
    "pretty printed": (b'{\n  "prompt": "a"\n}', "line 1: not JSON: Expecting property name enclosed in double quotes "
                       "(column 2); one row is one line of JSON"),
    "an array over lines": (b'[\n{"prompt": "a"},\n]', "line 1: not JSON: Expecting value (column 2); "
                            "one row is one line of JSON"),
    "an array a line": (b'{"a": 1}\n["a", "b"]', f"line 2: expected a JSON object, got list; {NEED}"),
    "a text a line": (b'"a"', f"line 1: expected a JSON object, got str; {NEED}"),
    "nothing a line": (b"null", f"line 1: expected a JSON object, got NoneType; {NEED}"),
    "Latin-1": ('{"a": "b"}\n\n{"a": "\u00e9"}\n'.encode("latin-1"),
                "line 3: not UTF-8 text (invalid continuation byte); save the file as UTF-8"),
    "UTF-16": ('{"a": "b"}'.encode("utf-16"), "line 1: not UTF-8 text (invalid start byte); save the file as UTF-8"),
    "a number of 5000 digits": (b'{"a": 1' + b"0" * 5000 + b"}", "line 1: not JSON: Exceeds the limit (4300 digits)"),
    "brackets without end": (b'{"a": ' + b"[" * 100_000, "line 1: not JSON: maximum recursion depth exceeded"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file(name: str) -> None:
    content, message = BROKEN[name]
    Path("rows.jsonl").write_bytes(content)
    assert said("rows.jsonl").startswith(f"rows.jsonl, {message}")
    if "limit" not in message and "recursion" not in message:
        assert said("rows.jsonl") == f"rows.jsonl, {message}"


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf\r\n"])
def test_a_file_without_rows(content: bytes) -> None:
    Path("rows.jsonl").write_bytes(content)
    assert said("rows.jsonl") == f"rows.jsonl holds no rows; {NEED}"


def test_a_file_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    Path("rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert said("rows.jsonl") == "cannot read rows.jsonl: [Errno 13] Permission denied: 'rows.jsonl'"
