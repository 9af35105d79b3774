"""Tensors in safetensors files, read a few rows at a time.

A file is a header (JSON: name, dtype, shape, place) and the bytes behind it. Rows are read with ``pread`` into a
buffer of their own, not through a memory map: a file that was cut, or lies on a Drive that went away, is then an
error instead of the end of the process (SIGBUS), and what was read does not count as memory of this process. What it
costs is a copy: 2.5 GB came from the page cache in 2.1 s, on a busy machine.

The header is checked before anything is read: places within the file, as long as the shapes say, one beside the
other. Nothing but safetensors and JSON is opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.units import format_bytes

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
# safetensors itself reads no longer header.
LONGEST_HEADER = 100_000_000
FULL_HEADER = 8


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where one tensor lies.

    Args:
        start: of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows ``first`` to ``last``, as they are stored, in memory of their own; all of a tensor without rows.

        Raises:
            ModelError: the file is shorter than its header said, or is gone.
        """
        if not self.shape:
            return self._bytes(self.start, (), self.n_bytes)
        last = self.shape[0] if last is None else min(last, self.shape[0])
        row_bytes = self.n_bytes // self.shape[0] if self.shape[0] else 0
        return self._bytes(self.start + first * row_bytes, (last - first, *self.shape[1:]), (last - first) * row_bytes)

    def _bytes(self, start: int, shape: tuple[int, ...], n_bytes: int) -> torch.Tensor:
        values = torch.empty(shape, dtype=self.dtype)
        raw: Any = values.reshape(-1).view(torch.uint8).numpy() if n_bytes else b""
        view = memoryview(raw)
        try:
            with self.file.open("rb", buffering=0) as opened:
                done = 0
                while done < n_bytes:
                    n = os.preadv(opened.fileno(), [view[done:]], start + done)
                    if n == 0:
                        raise ModelError(f"{self.file} ends early: it was cut after it was opened")
                    done += n
        except OSError as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{self.file} cannot be read: {error.strerror or error}") from error
        return values


class StoredTensors(Mapping[str, Stored]):
    """The tensors of one file, or of all files that an index names, in the order in which they lie on the disk."""

    def __init__(self, files: list[Path]) -> None:
        self._found: dict[str, Stored] = {}
        for file in files:
            self._found |= read_header(file)

    def __getitem__(self, name: str) -> Stored:
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def n_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.n_bytes for t in self._found.values())


def open_model(folder: Path) -> StoredTensors:
    """The tensors of a model's folder.

    Raises:
        ModelError: it has no safetensors, a file that its index names is missing, or one is damaged.
    """
    if (folder / INDEX).is_file():
        names = _names_of(folder / INDEX)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} is incomplete: {INDEX} names {missing[0]}, which is not there")
        return StoredTensors([folder / name for name in names])
    if (folder / SINGLE).is_file():
        return StoredTensors([folder / SINGLE])
    raise ModelError(f"{folder} has no {SINGLE} and no {INDEX}; weights in other formats are not read")


def _names_of(index: Path) -> list[str]:
    try:
        names = sorted({str(name) for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelError(f"{index} is not an index of safetensors files") from error
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError(f"{index} names a file outside its folder: {outside[0]}")
    return names


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one file by name, in the order of their places.

    Raises:
        ModelError: it is no safetensors file, or is not whole.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(FULL_HEADER), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - FULL_HEADER):
                raise ModelError(f"{file} is no safetensors file, or was cut: {format_bytes(size)}")
            header = json.loads(opened.read(length))
    except ValueError as error:
        raise ModelError(f"{file} is no safetensors file: its header is not JSON") from error
    except OSError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file} cannot be read: {error.strerror or error}") from error
    if not isinstance(header, dict):
        raise ModelError(f"{file} is no safetensors file: its header is a list")
    header.pop("__metadata__", None)
    found = {name: _stored(file, name, entry, FULL_HEADER + length) for name, entry in header.items()}
    ordered = dict(sorted(found.items(), key=lambda item: item[1].start))
    _check_places(file, ordered, FULL_HEADER + length, size)
    return ordered


def _stored(file: Path, name: str, entry: Any, begin: int) -> Stored:
    try:
        shape, (first, last) = tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
    except KeyError as error:
        raise ModelError(f"{file}: {name} is stored as {error}, which is not read") from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{file}: what its header says of {name} makes no sense") from error
    stored = Stored(file=file, dtype=dtype, shape=shape, start=begin + first)
    if min((0, *shape)) < 0 or last - first != stored.n_bytes:
        raise ModelError(f"{file}: {name} has {last - first} bytes, and {shape} in {dtype} needs {stored.n_bytes}")
    return stored


def _check_places(file: Path, found: Mapping[str, Stored], begin: int, size: int) -> None:
    at = begin
    for name, stored in found.items():
        if stored.start != at:
            raise ModelError(f"{file}: {name} begins at byte {stored.start}, and what lies before it ends at {at}")
        at += stored.n_bytes
    if at != size:
        raise ModelError(f"{file} has {size} bytes, and its header speaks of {at}: it was cut, or copied badly")
