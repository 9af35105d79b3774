"""How much memory saving may take, and where buffers lie that do not fit into it.

``maximum_memory_usage`` is a share of what is *free* when saving begins: after training a machine is full, and what
others hold is not ours to take. Buffers come from a :class:`Workspace`: in RAM as long as they fit into the share,
otherwise as a memory-mapped safetensors file in ``temporary_location``, which the kernel writes back and drops as it
needs the pages. The file's room is reserved before it is mapped, since a full disk under a mapping is not an error but
the end of the process.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbqlora.core import checks
from nbqlora.core.errors import ConfigError, OutOfDiskError, Problem
from nbqlora.core.units import MIB, format_bytes

MOST = 0.95
# fp32 bytes of the rows that are worked on at once. Reading, adding and casting a 14336 x 4096 weight on 2 cores: 0.11
# s with 4 MiB, 0.09 with 8 and 16, 0.14 with 32, 0.19 with 64, whose memory is new to the process each time.
PIECE_BYTES = 8 * MIB
SMALLEST_PIECE_BYTES = 1 * MIB
# A piece lives as it was read, in fp32, as what is written, and twice on its way to the disk.
COPIES = 5
_NAMES = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def check_share(maximum_memory_usage: object) -> float:
    """The share, checked. Raises :class:`ConfigError` unless it is above 0 and at most 0.95."""
    wrong = checks.number(above=0)(maximum_memory_usage)
    if not wrong and float(str(maximum_memory_usage)) > MOST:
        wrong = f"{maximum_memory_usage} is above {MOST}: the rest of the machine needs memory too"
    if wrong:
        raise ConfigError([Problem(key="maximum_memory_usage", message=wrong, hint=f"0.9 is usual, {MOST} the most")])
    return float(str(maximum_memory_usage))


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """Bytes that saving may take of RAM, and of the card."""

    ram_bytes: int
    vram_bytes: int = 0

    @property
    def piece_bytes(self) -> int:
        """fp32 bytes of the rows to work on at once, so that all their copies take half of the RAM at most."""
        return max(SMALLEST_PIECE_BYTES, min(PIECE_BYTES, self.ram_bytes // (2 * COPIES)))


class Workspace:
    """Buffers of a save: in RAM while they fit, in a mapped file after that.

    Args:
        ram_bytes: for all buffers that are alive together.
        folder: for the files; it exists.
        prefix: of their names, so that a later start knows what a killed one left.

    Attributes:
        spilled_bytes: the most that lay in files at once.
    """

    def __init__(self, ram_bytes: int, folder: Path, prefix: str) -> None:
        self._free, self._folder, self._prefix = ram_bytes, folder, prefix
        self._in_ram: dict[int, int] = {}
        self._files: dict[int, tuple[Path, int]] = {}
        self.spilled_bytes = 0

    def empty(self, n: int, dtype: torch.dtype) -> torch.Tensor:
        """A vector of ``n`` elements, not filled.

        Raises:
            OutOfDiskError: it fits neither the RAM that is allowed nor the disk.
        """
        n_bytes = n * dtype.itemsize
        if n_bytes <= self._free:
            buffer = torch.empty(n, dtype=dtype)
            self._free -= n_bytes
            self._in_ram[id(buffer)] = n_bytes
            return buffer
        buffer, path = _mapped(self._folder / f"{self._prefix}spill-{secrets.token_hex(4)}.safetensors", n, dtype)
        self._files[id(buffer)] = (path, n_bytes)
        self.spilled_bytes = max(self.spilled_bytes, sum(size for _, size in self._files.values()))
        return buffer

    def give_back(self, buffer: torch.Tensor) -> None:
        """The buffer is not used any more; its file goes."""
        self._free += self._in_ram.pop(id(buffer), 0)
        if id(buffer) in self._files:
            path, _ = self._files.pop(id(buffer))
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove all files."""
        for path, _ in self._files.values():
            path.unlink(missing_ok=True)
        self._files.clear()


def _mapped(path: Path, n: int, dtype: torch.dtype) -> tuple[torch.Tensor, Path]:
    """A vector in a safetensors file of its own."""
    n_bytes = n * dtype.itemsize
    entry = {"data": {"dtype": _NAMES[dtype], "shape": [n], "data_offsets": [0, n_bytes]}}
    text = json.dumps(entry).encode()
    text += b" " * (-(8 + len(text)) % 64)
    size = 8 + len(text) + n_bytes
    try:
        with path.open("xb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.flush()
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        path.unlink(missing_ok=True)
        if error.errno != errno.ENOSPC:
            raise
        raise OutOfDiskError(
            f"{format_bytes(n_bytes)} fit neither the memory that saving may use nor {path.parent}; raise "
            "maximum_memory_usage, or name a temporary_location on a larger disk"
        ) from error
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=size)
    whole = torch.empty(0, dtype=torch.uint8).set_(storage)
    return whole[8 + len(text) :].view(dtype), path
