"""A folder's safetensors as a :class:`WeightStream`: a few rows at a time, in odd pieces."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class FolderStream:
    """The model in a folder, as it is.

    Args:
        rows: of a matrix in one piece.
        replaced: values in place of those in the file.
    """

    def __init__(self, folder: Path, *, rows: int = 7, replaced: Mapping[str, torch.Tensor] | None = None) -> None:
        self.folder = self.tokenizer_folder = folder
        self.config: Mapping[str, Any] = json.loads((folder / "config.json").read_text())
        self._rows = rows
        self._replaced = replaced or {}
        self._slices: dict[str, Any] = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, "pt")
            self._slices |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        self.names = tuple(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._slices[name].get_dtype()]

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        stored = self._replaced.get(name, self._slices[name])
        length = self.shape(name)[0]
        for begin in range(0, length, self._rows):
            yield stored[begin : min(begin + self._rows, length)].float()
