"""Safetensors files written from start to end: the header first, then tensor after tensor as it is made.

What a file will hold is known before its first value is: names, dtypes and shapes make the header, so nothing has to
be held until it is complete. Two threads write and hash while the next rows are computed. Writes are handed to the
disk every 256 MiB, so that a container's limit is not filled with pages that wait to be written.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import queue
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.units import MIB
from nbqlora.hub.atomic import hidden_beside, sync
from nbqlora.hub.stored import DTYPES

FLUSH_BYTES = 256 * MIB
BUFFERS = 6
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class Written:
    """A file that is on the disk."""

    file: str
    n_bytes: int
    sha256: str


def plan_shards(entries: Sequence[Entry], max_bytes: int) -> dict[str, tuple[Entry, ...]]:
    """Tensors by file, in order; a file is filled until the next tensor would make it larger than ``max_bytes``.

    One file is ``model.safetensors``; several are ``model-00001-of-00003.safetensors``, ....
    """
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(e.n_bytes for e in groups[-1]) + entry.n_bytes > max_bytes:
            groups.append([])
        groups[-1].append(entry)
    if len(groups) == 1:
        return {"model.safetensors": tuple(groups[0])}
    n = len(groups)
    return {f"model-{i:05d}-of-{n:05d}.safetensors": tuple(group) for i, group in enumerate(groups, start=1)}


def index_of(shards: Mapping[str, Sequence[Entry]]) -> dict[str, Any]:
    """``model.safetensors.index.json`` of several files."""
    total = sum(entry.n_bytes for entries in shards.values() for entry in entries)
    weight_map = {entry.name: file for file, entries in shards.items() for entry in entries}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_shard(
    target: Path,
    entries: Sequence[Entry],
    pieces: Callable[[str, torch.dtype], Iterable[torch.Tensor]],
    done: Callable[[int], None] = lambda n_bytes: None,
) -> Written:
    """Write one file beside, sync it, give it its name.

    Args:
        entries: what it holds, in order.
        pieces: a tensor's values in order, given its name and dtype; another dtype is cast.
        done: called with the bytes of each piece once it is handed to the disk.

    Raises:
        OSError: the disk is full, or refuses; nothing is left of the file.
        ModelError: a value does not fit the dtype.
    """
    temporary = hidden_beside(target)
    try:
        with temporary.open("xb", buffering=0) as file:
            digest = hashlib.sha256()
            with _Writer(file, digest, done) as writer:
                header = torch.frombuffer(bytearray(_header(entries)), dtype=torch.uint8)
                writer.put(header, len(header))
                for entry in entries:
                    _write(entry, pieces(entry.name, entry.dtype), writer)
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, target)
        sync(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return Written(file=target.name, n_bytes=size, sha256=digest.hexdigest())


def _header(entries: Sequence[Entry]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for entry in entries:
        offsets = [at, at + entry.n_bytes]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": offsets}
        at += entry.n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write(entry: Entry, pieces: Iterable[torch.Tensor], writer: _Writer) -> None:
    n_bytes = 0
    for piece in pieces:
        size = piece.numel() * entry.dtype.itemsize
        buffer = writer.buffer(size)
        values = buffer[:size].view(entry.dtype).view(piece.shape).copy_(piece)
        if values.dtype == torch.float16 and not torch.isfinite(values).all() and torch.isfinite(piece).all():
            raise ModelError(f'{entry.name} has values beyond what fp16 holds (65504); write dtype="bf16"')
        n_bytes += size
        writer.put(buffer, size)
    if n_bytes != entry.n_bytes:
        raise ModelError(f"{entry.name} came as {n_bytes} bytes, and {entry.shape} needs {entry.n_bytes}")


class _Writer:
    """Writes in one thread and hashes in another; what they raise is raised at the next ``put`` or at the end.

    The buffers go round: filled, written, hashed, filled again. Blocks that one thread takes from the heap and another
    gives back leave holes in it: a merge of the demo model was seen to hold 0.5 GiB more on a busy machine.
    """

    def __init__(self, file: IO[bytes], digest: Any, done: Callable[[int], None]) -> None:
        self._file, self._digest, self._done = file, digest, done
        self._unsynced = 0
        self._error: BaseException | None = None
        # A buffer is filled, one is written, one is hashed, and one waits for each of them.
        self._free: _Line = queue.Queue()
        for _ in range(BUFFERS):
            self._free.put((None, 0))
        self._written: _Line = queue.Queue()
        self._given: _Line = queue.Queue()
        self._threads = [
            threading.Thread(target=self._pass_on, args=stage, name=f"nbqlora-{stage[0].__name__}", daemon=True)
            for stage in ((self._write, self._given, self._written), (self._hash, self._written, self._free))
        ]

    def buffer(self, n_bytes: int) -> torch.Tensor:
        """A buffer of at least so many bytes, to be filled and ``put``; waits for one that went round."""
        found, _ = self._free.get()
        return torch.empty(n_bytes, dtype=torch.uint8) if found is None or len(found) < n_bytes else found

    def put(self, buffer: torch.Tensor, n_bytes: int) -> None:
        """Write the first bytes of this buffer."""
        self._given.put((buffer, n_bytes))
        if self._error is not None:
            raise self._error

    def __enter__(self) -> _Writer:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._given.put((None, 0))
        for thread in self._threads:
            thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def _pass_on(self, do: Callable[[memoryview], None], taken: _Line, given: _Line) -> None:
        """Do something with each buffer in turn, until there is none; after an error, only pass them on."""
        while True:
            buffer, n_bytes = taken.get()
            if buffer is not None and self._error is None:
                raw: Any = buffer.numpy()
                try:
                    do(memoryview(raw)[:n_bytes])
                except BaseException as error:  # told to the thread that gives
                    self._error = error
            given.put((buffer, n_bytes))
            if buffer is None:
                return

    def _write(self, block: memoryview) -> None:
        at = 0
        while at < len(block):
            at += self._file.write(block[at:])
        self._unsynced += len(block)
        if self._unsynced >= FLUSH_BYTES:
            os.fdatasync(self._file.fileno())
            self._unsynced = 0
        self._done(len(block))

    def _hash(self, block: memoryview) -> None:
        self._digest.update(block)


_Line = queue.Queue[tuple[torch.Tensor | None, int]]
