"""Objects of the notebook -> rows: tables are turned into Python objects a thousand rows at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.source import Numbered, Row, Rows

BATCH = 1000


def object_rows(source: Any) -> Rows:
    """Rows of a DataFrame, a ``datasets.Dataset`` or ``IterableDataset``, an Arrow table, or an iterable of mappings.

    An iterator can be read only once, so its rows are kept in memory, and its name says so.

    Raises:
        DataError: it is none of these, or holds something that is no mapping.
    """
    kind = type(source).__name__
    name = f"{kind} of rows"
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        if not source.columns.is_unique:
            raise DataError(f"the {kind} has a column twice: {', '.join(map(str, source.columns))}; rename one")
        return Rows(source=f"{kind} of {len(source)} rows", n_rows=len(source), read=partial(_frame, source))
    if hasattr(source, "with_format"):
        plain = source.with_format(None)
        if not hasattr(plain, "__len__"):
            return Rows(source=name, n_rows=None, read=lambda: enumerate(plain, start=1))
        return Rows(source=f"{kind} of {len(plain)} rows", n_rows=len(plain), read=partial(_dataset, plain))
    if hasattr(source, "__arrow_c_stream__") and hasattr(source, "columns"):
        return Rows(source=name, n_rows=None, read=partial(_arrow, source))
    if isinstance(source, Iterable):
        rows = _checked(source, kind)
        once = " (an iterator, now in memory)" if isinstance(source, Iterator) else ""
        return Rows(source=name + once, n_rows=len(rows), read=lambda: enumerate(rows, start=1))
    raise DataError(f"cannot read rows from a {kind}; expected a file, a list of dicts, a DataFrame or a Dataset")


def _frame(frame: Any) -> Numbered:
    starts = range(0, len(frame), BATCH)
    return enumerate((row for i in starts for row in frame.iloc[i : i + BATCH].to_dict(orient="records")), start=1)


def _dataset(dataset: Any) -> Numbered:
    # Five times as fast as its rows one by one.
    batches = dataset.iter(batch_size=BATCH)
    rows = (dict(zip(batch, row, strict=True)) for batch in batches for row in zip(*batch.values(), strict=True))
    return enumerate(rows, start=1)


def _arrow(table: Any) -> Numbered:
    """Of whatever speaks Arrow's stream protocol: pyarrow, polars, DuckDB."""
    from pyarrow import RecordBatchReader

    batches = RecordBatchReader.from_stream(table)
    parts = (batch.slice(i, BATCH) for batch in batches for i in range(0, batch.num_rows, BATCH))
    return enumerate((row for part in parts for row in part.to_pylist()), start=1)


def _checked(source: Iterable[Any], kind: str) -> list[Row]:
    rows: list[Row] = []
    for number, row in enumerate(source, start=1):
        if not isinstance(row, Mapping):
            such = ' such as {"text": "..."}' if isinstance(row, str) else ""
            raise DataError(f"row {number} of the {kind} is a {type(row).__name__}; expected a dict{such}")
        rows.append(row)
    return rows
