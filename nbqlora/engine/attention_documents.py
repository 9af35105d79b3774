"""Where documents begin in a batch, as attention's kernels read it: running sums of lengths, on the device.

Everything that a captured step does with them works on tensors of a fixed size and never asks the device for a number.
So the boundaries may be filled up with documents of no tokens (the last value repeated), and the longest document may
be given as a bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True, kw_only=True)
class Documents:
    """Documents in ``rows`` rows of ``seq`` tokens, laid out row after row; none reaches over the end of a row.

    Args:
        rows: rows of the batch.
        seq: tokens of a row.
        cu_seqlens: int32 ``[n_docs + 1]`` on the device, from 0 to ``tokens``; None where each row is one document.
        max_tokens: tokens of the longest document, or a bound of it.
        lengths: tokens of each document, where the host knows them. Only what works document by document asks for
            them, and reads ``cu_seqlens`` back without them.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    rows: int
    seq: int
    cu_seqlens: torch.Tensor | None
    max_tokens: int
    lengths: tuple[int, ...] | None

    def __post_init__(self) -> None:
        problems = []
        if min(self.rows, self.seq, self.max_tokens) < 1:
            problems.append(f"rows, seq and max_tokens are at least 1, not {self.rows}, {self.seq}, {self.max_tokens}")
        cu = self.cu_seqlens
        if cu is None and self.max_tokens < self.seq:
            problems.append(f"documents of {self.seq} tokens are longer than max_tokens={self.max_tokens}")
        if cu is not None and (cu.dtype != torch.int32 or cu.dim() != 1 or cu.numel() < 2 or not cu.is_contiguous()):
            problems.append(f"cu_seqlens is contiguous int32 [n_docs + 1], not {cu.dtype} {list(cu.shape)}")
        if self.lengths is not None and sum(self.lengths) != self.tokens:
            problems.append(f"documents have {sum(self.lengths)} tokens, rows have {self.tokens}")
        if self.lengths is not None and max(self.lengths, default=0) > self.max_tokens:
            problems.append(f"a document has {max(self.lengths)} tokens, more than max_tokens={self.max_tokens}")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.seq

    @property
    def count(self) -> int:
        """Documents, those of no tokens included."""
        return self.rows if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def longest(self) -> int:
        """Tokens that no document exceeds."""
        return self.seq if self.cu_seqlens is None else min(self.max_tokens, self.tokens)

    def spans(self) -> list[tuple[int, int]]:
        """Where each document that has tokens begins and ends; waits for the device where ``lengths`` are not given."""
        if self.cu_seqlens is None:
            edges = list(range(0, self.tokens + 1, self.seq))
        elif self.lengths is None:
            edges = self.cu_seqlens.tolist()
        else:
            edges = [0]
            for length in self.lengths:
                edges.append(edges[-1] + length)
        return [(a, b) for a, b in pairwise(edges) if a < b]


def token_places(cu_seqlens: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Document of each token, and the token's place in it: int64 ``[tokens]`` each."""
    at = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens.device)
    # From the right: a document of no tokens ends where it begins, and is passed over.
    document = torch.searchsorted(cu_seqlens, at, right=True) - 1
    return document, at - cu_seqlens[document]


def documents_from_positions(position_ids: torch.Tensor, *, max_documents: int) -> torch.Tensor:
    """Boundaries of the documents in a batch: one begins with each row, and where positions restart at 0.

    The device is not asked how many there are: :func:`count_documents` does that. Documents beyond ``max_documents``
    would count as part of the last.

    Args:
        position_ids: ``[rows, seq]``.
        max_documents: size of the result.

    Returns:
        int32 ``[max_documents + 1]``, filled up with the number of tokens.
    """
    begun = _begins(position_ids).cumsum(0, dtype=torch.int32)
    number = torch.arange(1, max_documents + 2, dtype=torch.int32, device=begun.device)
    edges = torch.searchsorted(begun, number, out_int32=True)
    edges[-1:].fill_(begun.numel())
    return edges


def count_documents(position_ids: torch.Tensor) -> int:
    """Documents in ``position_ids`` ``[rows, seq]``, as :func:`documents_from_positions` finds them; waits once."""
    return int(_begins(position_ids).sum())


def _begins(position_ids: torch.Tensor) -> torch.Tensor:
    """Whether a document begins with this token: ``[rows * seq]``."""
    begins = position_ids == 0
    begins[:, 0] = True
    return begins.flatten()
