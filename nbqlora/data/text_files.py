"""Text files -> rows, each with the number of the line that it begins on: JSONL and JSON.

JSONL is read line by line, so that ten million rows need no more memory than ten. A ``.json`` file is one
value: only the whole of it can be parsed, so it is refused where that would fill a small machine. Files are
UTF-8; another encoding is found by the first line that it breaks, never guessed.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from nbqlora.core.errors import DataError
from nbqlora.core.units import GIB, MIB, format_bytes
from nbqlora.data.source import Numbered, Row

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# A longer line is a file of another kind: reading on would end with all of it in memory.
LONGEST_LINE_BYTES = 64 * MIB
LARGEST_JSON_BYTES = GIB
ONE_ROW_A_LINE = "one row is one line of JSON; a file that is one list of objects is named .json"
# Keys that make a single object a row, rather than a frame around rows.
ROW_KEYS = {"messages", "conversations", "prompt", "instruction", "text"}


def opened(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked where its name ends in ``.gz``."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    return path.open("rb")


def read_lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line, with its line break.

    Raises:
        DataError: a line is not UTF-8, or far too long.
    """
    with opened(path) as file:
        for number, line in enumerate(_raw_lines(file), start=1):
            if len(line) >= LONGEST_LINE_BYTES:
                raise DataError(f"{name}, line {number}: longer than {format_bytes(LONGEST_LINE_BYTES)}; is this text?")
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(_not_utf8(error, f"{name}, line {number}")) from None


def _raw_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Lines without the byte order mark; a line that is too long comes in pieces."""
    yield file.readline(LONGEST_LINE_BYTES).removeprefix(BOM)
    while line := file.readline(LONGEST_LINE_BYTES):
        yield line


def _not_utf8(error: UnicodeDecodeError, where: str) -> str:
    what = "it is UTF-16" if error.object[:2] in UTF16 else f"byte 0x{error.object[error.start]:02X}, {error.reason}"
    return f"{where}: not UTF-8 text ({what}); save the file as UTF-8"


def read_jsonl(path: Path, name: str) -> Numbered:
    """One JSON object a line; blank lines are passed over. Raises :class:`DataError`."""
    for number, line in read_lines(path, name):
        text = line.rstrip()
        if text:
            yield number, _parsed_line(text, f"{name}, line {number}")


def _parsed_line(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = f"; {ONE_ROW_A_LINE}" if text.strip() in ("[", "{") else ""
        raise DataError(f"{where}: not JSON: {_why(error)}{hint}") from None
    if not isinstance(row, dict):
        hint = f"; {ONE_ROW_A_LINE}" if isinstance(row, list) else ""
        raise DataError(f"{where}: expected a JSON object, got {type(row).__name__}{hint}")
    return row


def _why(error: Exception) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def is_json_lines(path: Path) -> bool:
    """Whether the first line is a whole object and another line follows: JSONL under another name."""
    with opened(path) as file:
        lines = (line for line in _raw_lines(file) if line.strip())
        first, second = next(lines, b""), next(lines, b"")
    try:
        return bool(second) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def load_json(path: Path, name: str) -> list[Row]:
    """The rows of a file that is one JSON value: a list of objects, or an object that holds one.

    Raises:
        DataError: it is too large to be read whole, not JSON, or holds no such list.
    """
    large = path.stat().st_size > LARGEST_JSON_BYTES
    if not large:
        with opened(path) as file:
            content = file.read(LARGEST_JSON_BYTES + 1)
        large = len(content) > LARGEST_JSON_BYTES
    if large:
        raise DataError(
            f"{name} holds more than {format_bytes(LARGEST_JSON_BYTES)}, and .json is read as a whole; "
            "write it as .jsonl, one object a line, which is read line by line"
        )
    content = content.removeprefix(BOM)
    return _rows_in(_parsed_file(content, name), name) if content.strip() else []


def _parsed_file(content: bytes, name: str) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(_not_utf8(error, f"{name}, line {line}")) from None
    except (ValueError, RecursionError) as error:
        where = f"{name}, line {error.lineno}" if isinstance(error, json.JSONDecodeError) else name
        raise DataError(f"{where}: not JSON: {_why(error)}") from None


def _rows_in(value: Any, name: str) -> list[Row]:
    if isinstance(value, dict):
        frames = {key: held for key, held in value.items() if isinstance(held, list)}
        if value.keys() & ROW_KEYS and not _is_columns(value):
            return [value]
        if len(frames) != 1:
            raise DataError(f"{name} is one object {_what(value, frames)}")
        ((key, value),) = frames.items()
        name = f"{name}, {key}"
    if not isinstance(value, list):
        raise DataError(f"{name} is one {type(value).__name__}; expected a list of objects, one a row")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{name}, row {number}: expected an object, got {type(row).__name__}")
    return value


def _is_columns(value: dict[str, Any]) -> bool:
    return bool(value) and all(isinstance(held, dict) for held in value.values())


def _what(value: dict[str, Any], frames: Mapping[str, Any]) -> str:
    if frames:
        return f"that holds several lists ({', '.join(frames)}); give the list of rows in a file of its own"
    if _is_columns(value):
        return 'of columns; let pandas write rows: to_json("rows.jsonl", orient="records", lines=True)'
    return f"with the keys {', '.join(value) or '(none)'}; expected a list of objects, one a row"
