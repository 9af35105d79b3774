"""Counts while rows pass by, and the report at the end; 12 bytes a row are kept, never the rows.

Duplicates are found by 8-byte hashes of the tokens: among ten million rows a false pair has a chance of one
in 370,000.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from nbqlora.core.data_report import PADDED_ROWS, DataReport, Preview, Skipped, listed
from nbqlora.core.errors import DataError
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.data.arrow import ROW
from nbqlora.data.tokens import IGNORED, EncodedRow

NOTHING_TO_LEARN = "nothing to learn from"
CUT_AWAY = "the answer begins after max_length"
OTHER_REASONS = "other reasons"
# Numbers of rows kept for a reason, and different reasons.
FEW_ROWS = 5
_MOST_REASONS = 40
_N_BINS = 12
_PERCENTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_DIGEST_BYTES = 16

Lengths = npt.NDArray[np.int32]


class Tally:
    """What was read so far.

    Args:
        unit: what the source calls a row.
        max_length: tokens that a row may have.
    """

    def __init__(self, source: str, unit: str, max_length: int) -> None:
        self._source, self._unit, self._max_length = source, unit, max_length
        self.n_read = self.n_kept = 0
        self._n_learned = self._n_cut_learned = 0
        # Before the cut: of the rows kept, of rows left out, and hashes of the rows kept.
        self._lengths, self._other_lengths, self._hashes = array("i"), array("i"), array("Q")
        self._skipped: dict[str, tuple[int, list[int]]] = {}
        self._hash = blake2b(digest_size=_DIGEST_BYTES)

    def skip(self, number: int, reason: str) -> None:
        """Count a row that is left out."""
        self.n_read += 1
        if reason not in self._skipped and len(self._skipped) >= _MOST_REASONS:
            reason = OTHER_REASONS
        count, few = self._skipped.get(reason, (0, []))
        self._skipped[reason] = (count + 1, [*few, number][:FEW_ROWS])

    def keep(self, number: int, row: EncodedRow) -> EncodedRow | None:
        """The row, cut at ``max_length`` and counted; None where then it teaches nothing."""
        n_tokens, n_learned = len(row.input_ids), row.n_learned
        n_left, short = n_learned, row
        if n_tokens > self._max_length:
            short = EncodedRow(input_ids=row.input_ids[: self._max_length], labels=row.labels[: self._max_length])
            n_left = short.n_learned
        if not n_left:
            self._other_lengths.append(n_tokens)
            self.skip(number, CUT_AWAY if n_learned else NOTHING_TO_LEARN)
            return None
        self.n_read += 1
        self.n_kept += 1
        self._n_learned += n_left
        self._n_cut_learned += n_learned - n_left
        self._lengths.append(n_tokens)
        ids = short.input_ids.tobytes()
        self._hashes.append(int.from_bytes(blake2b(ids, digest_size=8).digest(), sys.byteorder))
        self._hash.update(len(ids).to_bytes(8, "little") + ids + short.labels.tobytes())
        return short

    def check_start(self, n_first: int) -> None:
        """Raise :class:`DataError` when none of the first ``n_first`` rows can be used; looked at only then."""
        if self.n_read == n_first and not self.n_kept:
            raise self._too_few(f"none of the first {n_first:,} {self._unit}s can be used")

    def check(self) -> None:
        """Raise :class:`DataError` when fewer than half of all rows can be used."""
        n_lost = self.n_read - self.n_kept
        if not self.n_read:
            raise DataError(f"{self._source} holds no {self._unit}s")
        if n_lost > self.n_read / 2:
            raise self._too_few(f"{n_lost:,} of {self.n_read:,} {self._unit}s cannot be used")

    def _too_few(self, what: str) -> DataError:
        reasons = [f"  {s.count:,} x {s.reason} ({listed(s.rows, s.count, self._unit)})" for s in self._left_out()]
        limit = [f"  max_length is {self._max_length:,}"] if CUT_AWAY in self._skipped else []
        return DataError("\n".join([f"{self._source}: {what}", *reasons, *limit]))

    def _left_out(self) -> list[Skipped]:
        by_count = sorted(self._skipped.items(), key=lambda item: -item[1][0])
        return [Skipped(reason=reason, count=count, rows=tuple(few)) for reason, (count, few) in by_count]

    def stats(self, title: str) -> DataStats:
        """The counts that a plan needs. Args: title: the format's."""
        lengths = _numbers(self._lengths)
        ordered = np.sort(np.minimum(lengths, self._max_length))
        a, b, c, d, e = (int(ordered[round(p * (len(ordered) - 1))]) for p in _PERCENTILES)
        return DataStats(
            n_rows=self.n_kept,
            n_sequences=self.n_kept,
            n_tokens=int(ordered.sum(dtype=np.int64)),
            n_supervised_tokens=self._n_learned,
            max_tokens=int(ordered[-1]),
            percentiles=(a, b, c, d, e),
            n_truncated=int((lengths > self._max_length).sum()),
            n_skipped={s.reason: s.count for s in self._left_out()},
            source=self._source,
            format=title,
            layout=BatchLayout.PADDED,
            fingerprint=self._hash.hexdigest(),
        )

    def report(self, stats: DataStats, dataset: Any, tokenizer: Any) -> DataReport:
        """The report on rows that are not packed.

        Args:
            dataset: the rows kept, as :class:`nbqlora.data.arrow.RowWriter` wrote them.
            tokenizer: to read their tokens for the previews.
        """
        lengths, others = _numbers(self._lengths), _numbers(self._other_lengths)
        again = repeated(np.frombuffer(self._hashes, dtype=np.uint64))
        return DataReport(
            stats=stats,
            n_read=self.n_read,
            max_length=self._max_length,
            unit=self._unit,
            histogram=histogram(np.concatenate([lengths, others])),
            n_cut_tokens=int((lengths - np.minimum(lengths, self._max_length)).sum(dtype=np.int64)),
            n_cut_learned=self._n_cut_learned,
            n_duplicates=len(again),
            duplicate_rows=tuple(dataset[int(i)][ROW] for i in again[:FEW_ROWS]),
            skipped=tuple(self._left_out()),
            previews=tuple(self._previews(dataset, tokenizer)),
            fill=padded_fill(np.minimum(lengths, self._max_length)),
        )

    def _previews(self, dataset: Any, tokenizer: Any) -> list[Preview]:
        """The first row, one of middle length, and the one that loses most to the cut."""
        lengths = _numbers(self._lengths)
        middle = int(np.argsort(lengths, kind="stable")[(len(lengths) - 1) // 2])
        picked = {0: "the first"}
        picked.setdefault(middle, "of middle length")
        if lengths.max() > self._max_length:
            picked.setdefault(int(lengths.argmax()), "the longest")
        done = []
        for i, why in picked.items():
            row, n_tokens = dataset[i], int(lengths[i])
            pieces = read_pieces(row["input_ids"], row["labels"], tokenizer)
            n_cut = n_tokens - len(row["input_ids"])
            done.append(Preview(row=row[ROW], pieces=pieces, why=why, n_tokens=n_tokens, n_cut_tokens=n_cut))
        return done


def _numbers(values: array[int]) -> Lengths:
    return np.frombuffer(values, dtype=np.int32)


def repeated(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Indices of the values that stood before already, in order."""
    order = np.argsort(hashes, kind="stable")
    same = hashes[order[1:]] == hashes[order[:-1]]
    return np.sort(order[1:][same])


def histogram(lengths: Lengths) -> tuple[tuple[int, int, int], ...]:
    """About a dozen bins of a round width; the longest hundredth shares the last one, however long.

    Args:
        lengths: in tokens, at least one.
    """
    low, high = int(lengths.min()), int(lengths.max())
    most = int(np.quantile(lengths, 0.99, method="higher"))
    width = _round_up((most - low + 1) / (_N_BINS - 1))
    edges = [*range(low // width * width, most + 1, width)]
    edges.append(edges[-1] + width)
    if high >= edges[-1]:
        edges.append(high + 1)
    counts, _ = np.histogram(lengths, bins=edges)
    return tuple((max(a, min(low, 1)), b - 1, int(n)) for (a, b), n in zip(pairwise(edges), counts, strict=True))


def _round_up(width: float) -> int:
    """The next of 1, 2, 5, 10, 20, 50, …"""
    power = 1
    while True:
        for step in (1, 2, 5):
            if step * power >= width:
                return step * power
        power *= 10


def padded_fill(lengths: Lengths) -> float:
    """Expected share of tokens that are not padding, in batches of :data:`PADDED_ROWS` rows picked at random."""
    ordered = np.sort(lengths).astype(np.float64)
    chance = (np.arange(len(ordered) + 1) / len(ordered)) ** min(PADDED_ROWS, len(ordered))
    return float(ordered.mean() / (ordered * np.diff(chance)).sum())


def read_pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> tuple[tuple[str, bool], ...]:
    """The text of each run of tokens that are learned, or not."""
    counts = np.asarray(labels) != IGNORED
    edges = [0, *(np.flatnonzero(np.diff(counts)) + 1).tolist(), len(ids)]
    return tuple(
        (str(tokenizer.decode(list(ids[a:b]), clean_up_tokenization_spaces=False)), bool(counts[a]))
        for a, b in pairwise(edges)
    )
