"""One micro-batch as a plan sees it: how many tokens, and how many documents.

A captured batch has one of few shapes: the engine fills tokens up to a multiple of an eighth of the longest batch, and
documents up to a power of two. What is filled up takes memory and time like the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.specs import BatchLayout

# Rows of more tokens are not captured, as in the engine.
CAPTURED_TOKENS = 16384
# As the engine fills a captured batch up.
SHAPES, LEAST_STEP, LEAST_DOCUMENTS = 8, 64, 8


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The largest micro-batch of a run.

    Args:
        rows: rows, or packs.
        row_tokens: tokens of the longest of them; all are counted as long.
        supervised_tokens: of all of them, those that the loss counts.
        ragged: rows differ in length.
        layout: padded, or end to end.
        n_documents: rows that lie in it; None for ``rows``.
        longest_document: tokens of the longest of them; None for those of a row.
    """

    rows: int
    row_tokens: int
    supervised_tokens: int
    ragged: bool = True
    layout: BatchLayout = BatchLayout.PADDED
    n_documents: int | None = None
    longest_document: int | None = None

    def tokens(self, *, captured: bool) -> int:
        """Of all rows."""
        if not captured:
            return self.rows * self.row_tokens
        return self._lines * _up(self.line_tokens, self._step)

    def mean_tokens(self, typical: float, *, captured: bool) -> float:
        """Of all rows, where ``typical`` is what a row has, padded or not."""
        tokens = self.rows * typical
        if not captured:
            return tokens
        exact = not self.ragged and self.layout is not BatchLayout.PACKED
        filling = _up(self.line_tokens, self._step) - self.line_tokens if exact else self._step / 2
        return tokens + self._lines * filling

    @property
    def _lines(self) -> int:
        """Rows of the tensor."""
        return 1 if self.joined else self.rows

    @property
    def line_tokens(self) -> int:
        """Tokens of the longest of them."""
        return self.row_tokens * (self.rows if self.joined else 1)

    @property
    def _step(self) -> int:
        """Between two shapes."""
        return max(LEAST_STEP, _up(-(-self.line_tokens // SHAPES), LEAST_STEP))

    @property
    def joined(self) -> bool:
        """Rows lie end to end, as one."""
        return self.layout is not BatchLayout.PADDED

    @property
    def dense(self) -> bool:
        """Each row is one document."""
        return self.layout is BatchLayout.PADDED or (self.layout is BatchLayout.JOINED and self.rows == 1)

    def documents(self, *, captured: bool) -> int:
        """Documents as attention is told of them; a captured batch's are filled up with some of no tokens."""
        n = self.rows if self.n_documents is None else self.n_documents
        if self.dense or not captured:
            return self.rows if self.dense else n
        return max(LEAST_DOCUMENTS, 1 << n.bit_length())

    def longest(self, *, captured: bool) -> int:
        """Tokens of the longest document, as attention is told; what a captured batch is filled up with is one too."""
        if self.dense:
            return self.tokens(captured=captured) // self.rows
        longest = min(self.row_tokens, self.longest_document or self.row_tokens)
        return max(longest, self._step) if captured else longest


def _up(n: int, step: int) -> int:
    return -(-n // step) * step
