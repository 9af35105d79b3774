"""CSV and Parquet files -> rows, read piece by piece.

A value of a CSV file is text, and an empty one is nothing: the format cannot tell an empty text from a value
that is not there. Its lines are those of the file, also where a text in quotes goes over several.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.source import Numbered
from nbqlora.data.text_files import LONGEST_LINE_BYTES, read_lines

BATCH = 512
# A file named .csv has one of these between its values: the one that parts its header into most columns.
DELIMITERS = (",", ";", "\t", "|")
LONGEST_HEADER = 1 << 16
QUOTES = 'a text with quotes or line breaks stands in "quotes", and a quote in it is doubled'


def read_csv(path: Path, name: str) -> Numbered:
    """Rows of a file with a header; the delimiter is found from it.

    Raises:
        DataError: the header names a column twice, or a row is not CSV or has another number of values.
    """
    lines = read_lines(path, name)
    first, header = next(((n, text) for n, text in lines if text.strip()), (1, ""))
    delimiter = "\t" if ".tsv" in path.suffixes[-2:] else max(DELIMITERS, key=lambda d: _n_values(header, d))
    reader = csv.reader(chain([header], (text for _, text in lines)), delimiter=delimiter, strict=True)
    where = f"{name}, line"
    columns: list[str] = []
    while records := _records(reader, where, first):
        for number, values in records:
            if not columns:
                columns = _checked_header(values, f"{where} {number}")
            elif len(values) != len(columns):
                raise DataError(f"{where} {number}: {_miscounted(values, columns, delimiter)}")
            else:
                yield number, {column: value or None for column, value in zip(columns, values, strict=True)}


def _n_values(header: str, delimiter: str) -> int:
    first = header[:LONGEST_HEADER].splitlines()[:1]
    return len(next(csv.reader(first, delimiter=delimiter), []))


def _records(reader: Any, where: str, first: int) -> list[tuple[int, list[str]]]:
    """The next few records, each with the line that it begins on; blank lines are passed over.

    csv's limit on the length of a text belongs to the process: it is raised only while these are parsed.
    """
    records: list[tuple[int, list[str]]] = []
    before = csv.field_size_limit(LONGEST_LINE_BYTES)
    try:
        while len(records) < BATCH:
            number = first + reader.line_num
            values = next(reader, None)
            if values is None:
                break
            if len(values) > 1 or "".join(values).strip():
                records.append((number, values))
    except csv.Error as error:
        raise DataError(f"{where} {number}: not CSV: {_why(str(error))}") from None
    finally:
        csv.field_size_limit(before)
    return records


def _why(error: str) -> str:
    if "new-line" in error:
        return "its lines end in a bare carriage return; save it with the line breaks of Unix or Windows"
    endless = "unexpected end" in error or "field limit" in error
    return f"{'a quote opens here and is never closed' if endless else error}; {QUOTES}"


def _checked_header(values: list[str], where: str) -> list[str]:
    columns = [value.strip() for value in values]
    twice = sorted({c for c in columns if columns.count(c) > 1})
    if twice:
        raise DataError(
            f"{where}: the header names {twice[0] or 'an empty column'} twice; each column has its own name"
        )
    return columns


def _miscounted(values: list[str], columns: list[str], delimiter: str) -> str:
    sign = "a tab" if delimiter == "\t" else f'"{delimiter}"'
    columns_are = f"{len(columns)} column{'s' if len(columns) > 1 else ''} ({', '.join(columns)})"
    has = f"{len(values)} value{'s' if len(values) > 1 else ''}"
    return f'{has} for {columns_are}; a text that holds {sign} stands in "quotes"'


def read_parquet(path: Path, name: str) -> Numbered:
    """Rows of a Parquet file, one batch in memory at a time. Raises :class:`DataError`."""
    from pyarrow.parquet import ParquetFile

    with _broken_parquet(name), ParquetFile(path) as file:
        batches = file.iter_batches(batch_size=BATCH)
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


def n_rows_of_parquet(path: Path, name: str) -> int:
    """Rows as the file's own footer counts them. Raises :class:`DataError`."""
    from pyarrow.parquet import read_metadata

    with _broken_parquet(name):
        return int(read_metadata(path).num_rows)


@contextmanager
def _broken_parquet(name: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, UnicodeDecodeError) as error:  # the latter for names and texts that are not UTF-8
        raise DataError(f"{name}: not a Parquet file that can be read: {error}") from None
