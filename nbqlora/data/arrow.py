"""Rows of tokens on disk: written batch by batch, read through the page cache, packed by TRL.

Nothing here grows with the number of rows but files.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from nbqlora.core.errors import OutOfDiskError
from nbqlora.core.units import format_bytes
from nbqlora.data.tokens import EncodedRow

ROW = "row"


class RowWriter:
    """Writes ``input_ids``, ``labels`` (both int32) and the row's number in the source to an Arrow file.

    Raises:
        OutOfDiskError: the disk is full.
    """

    def __init__(self, path: Path) -> None:
        from datasets import Features, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        tokens = Sequence(Value("int32"))
        features = Features({"input_ids": tokens, "labels": tokens, ROW: Value("int64")})
        self._path, self._n_bytes = path, 0
        with out_of_disk(path):
            self._writer = ArrowWriter(path=str(path), features=features)

    def write(self, numbers: Sequence[int], rows: Sequence[EncodedRow]) -> None:
        """Add rows, with their numbers in the source."""
        if not rows:
            return
        columns = [_lists([row.input_ids for row in rows]), _lists([row.labels for row in rows])]
        table = pa.table([*columns, pa.array(numbers, type=pa.int64())], names=["input_ids", "labels", ROW])
        self._n_bytes += table.nbytes
        with out_of_disk(self._path, self._n_bytes):
            self._writer.write_table(table)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            # Closing writes what is left, which on a full disk fails again; the error on its way says why.
            with suppress(OSError):
                self._writer.close()
            return
        with out_of_disk(self._path, self._n_bytes):
            self._writer.finalize()


def _lists(rows: Sequence[Any]) -> Any:
    ends = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(rows)))


@contextmanager
def out_of_disk(path: Path, n_bytes: int = 0) -> Iterator[None]:
    """Within, a full disk is :class:`OutOfDiskError`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC and "No space left" not in str(error):
            raise
        raise OutOfDiskError(
            f"no room left in {path.parent} for the tokenized rows (they need more than {format_bytes(n_bytes)}); "
            "free some, or set the environment variable TMPDIR to a folder with more"
        ) from error


def open_rows(path: Path) -> Any:
    """The rows as a ``datasets.Dataset`` that stays on disk."""
    from datasets import Dataset

    return Dataset.from_file(str(path))


def pack(dataset: Any, max_length: int, path: Path) -> Any:
    """TRL's best-fit packing into packs of ``max_length``, a thousand rows at a time.

    Args:
        dataset: with ``input_ids`` and ``labels``, no row longer than ``max_length``.
        path: for the packs, on disk as well.

    Returns:
        ``datasets.Dataset`` with ``input_ids``, ``labels`` and ``seq_lengths``, the documents' lengths in order.
    """
    from trl import pack_dataset

    with out_of_disk(path, dataset.data.nbytes):
        return pack_dataset(dataset, max_length, strategy="bfd", map_kwargs={"cache_file_name": str(path)})


def find_rows(dataset: Any, documents: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Numbers in the source of the rows with these token ids, read batch by batch.

    Args:
        dataset: as written by :class:`RowWriter`.
    """
    wanted = {np.asarray(document, dtype=np.int32).tobytes() for document in documents}
    sizes = {len(each) // 4 for each in wanted}
    found: list[int] = []
    for batch in dataset.data.table.to_batches() if wanted else ():
        ids = batch.column("input_ids")
        ends, tokens = ids.offsets.to_numpy(), ids.values.to_numpy()
        for i in np.flatnonzero(np.isin(np.diff(ends), list(sizes))):
            if tokens[ends[i] : ends[i + 1]].tobytes() in wanted:
                found.append(batch.column(ROW)[int(i)].as_py())
    return tuple(found)
