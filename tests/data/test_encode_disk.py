"""Where the tokens are kept: gone when nobody needs them, and a full disk is an error that says so."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nbqlora.core.errors import DataError, OutOfDiskError
from nbqlora.data.arrow import RowWriter
from nbqlora.data.encode import encode
from nbqlora.data.source import Rows
from nbqlora.data.tokens import EncodedRow
from tests.data.small_rows import PACKED, PADDED, encoded, pair
from tests.data.small_tokenizers import words


def test_the_tokens_are_gone_when_nobody_needs_them() -> None:
    data = encoded([pair(1, 2)] * 50, layout=PACKED)
    folder = data.store.folder.path
    assert {file.suffix for file in folder.iterdir()} == {".arrow", ""}
    other = data.with_layout(PADDED, "")
    # Also what datasets writes about them.
    other.dataset.map(lambda row: {"n": len(row["input_ids"])})
    assert len(list(folder.iterdir())) == 4
    del data
    gc.collect()
    assert folder.exists()
    dataset = other.dataset
    del other
    gc.collect()
    assert not folder.exists()
    assert dataset[0]["input_ids"]


def test_an_error_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def read() -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate([pair(1, 2)] * 300, 1)
        raise DataError("rows.jsonl, line 301: not JSON")

    with pytest.raises(DataError, match="line 301"):
        encode(Rows(source="x", n_rows=None, read=read), words(), max_length=8, layout=PADDED)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full")
    row = EncodedRow(input_ids=np.arange(100_000, dtype=np.int32), labels=np.arange(100_000, dtype=np.int32))
    with pytest.raises(OutOfDiskError) as caught, RowWriter(full) as writer:
        writer.write([1], [row])
    assert str(caught.value) == (
        "no room left in /dev for the tokenized rows (they need more than 781 KiB); "
        "free some, or set the environment variable TMPDIR to a folder with more"
    )
