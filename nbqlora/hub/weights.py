"""What merging and exporting read: a model's tensors by name, a few rows at a time.

Whoever writes a file of a model needs three things of each tensor: its name, its shape, and its values in order.
A whole tensor is never asked for: 128k x 8192 in fp32 are 4 GiB, a few rows of it as many MiB as one likes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch


class WeightStream(Protocol):
    """A model's tensors under their names in a transformers checkpoint.

    Attributes:
        folder: with ``config.json``, and the tokenizer's files unless ``tokenizer_folder`` has them.
        tokenizer_folder: where the tokenizer and its chat template are read from.
        config: ``config.json`` as plain values.
        names: of all tensors, in the order in which they are read fastest; a tied head is not among them.
    """

    folder: Path
    tokenizer_folder: Path
    config: Mapping[str, Any]
    names: tuple[str, ...]

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """How it is stored in the base."""
        ...

    def pieces(self, name: str) -> Iterator[torch.Tensor]:
        """Its values in order, as fp32 on the CPU: ``[rows, ...]`` each, a vector in one piece or more.

        A tensor that holds no floating-point numbers comes as it is. A piece is valid until the next one is taken.
        """
        ...
