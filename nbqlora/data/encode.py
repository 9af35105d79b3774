"""Rows -> the data set that the trainer takes as it is, and the counts that a plan needs.

Packing is TRL's best-fit packing, done here rather than in the trainer: the number of packs decides the
number of steps, and a plan must know it before anything is loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.core.specs import DataStats
from nbqlora.data.messages import is_missing
from nbqlora.data.render import EncodedRow, check_tokenizer, encode_row
from nbqlora.data.rows import Rows, no_progress_bars

NOTHING_TO_LEARN = "nothing to learn from"
CUT_AWAY = "the answer begins after max_length"


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodedData:
    """Token ids and labels, ready for the trainer.

    Args:
        dataset: ``datasets.Dataset`` with ``input_ids`` and ``labels``, each ``[seq]``, and after packing
            ``seq_lengths``, the documents' lengths in order.
        row_numbers: for each unpacked row kept, its number in the source, from 1.
        rows: the encoded rows kept, in the source's order.
    """

    dataset: Any
    stats: DataStats
    rows: tuple[EncodedRow, ...]
    row_numbers: tuple[int, ...]

    def __repr__(self) -> str:
        return f"EncodedData({self.stats.source}: {self.stats.n_rows} rows, {self.stats.n_tokens} tokens)"

    def find_rows(self, documents: list[list[int]]) -> tuple[int, ...]:
        """Numbers in the source of the rows with these token ids; a failing batch is named by them."""
        wanted = {tuple(d) for d in documents}
        return tuple(n for n, row in zip(self.row_numbers, self.rows, strict=True) if tuple(row.input_ids) in wanted)


def encode(
    rows: Rows, tokenizer: Any, *, max_length: int, assistant_only_loss: bool = True, packing: bool = False
) -> EncodedData:
    """Tokenize, cut at ``max_length``, count and pack.

    Args:
        max_length: tokens a row, or a pack, may have.
        packing: fill packs of ``max_length`` tokens with whole rows.

    Raises:
        DataError: a row cannot be read, or nothing is left to learn from.
    """
    check_tokenizer(tokenizer, _has_messages(rows.rows[0]))
    kept, numbers = [], []
    skipped: Counter[str] = Counter()
    n_truncated = 0
    for number, row in enumerate(rows.rows, start=1):
        where = f"row {number} of {rows.source}"
        encoded = encode_row(row, tokenizer, assistant_only_loss=assistant_only_loss, where=where)
        cut = len(encoded.input_ids) > max_length
        short = EncodedRow(input_ids=encoded.input_ids[:max_length], labels=encoded.labels[:max_length])
        if not short.n_supervised:
            skipped[CUT_AWAY if encoded.n_supervised else NOTHING_TO_LEARN] += 1
            continue
        n_truncated += cut
        kept.append(short)
        numbers.append(number)
    if not kept:
        raise DataError(f"{rows.source}: no row teaches anything: {_reasons(skipped)}; max_length is {max_length}")
    dataset = _dataset(kept, max_length, packing)
    stats = replace(
        _counted(kept), n_sequences=len(dataset), n_truncated=n_truncated, n_skipped=dict(skipped), source=rows.source
    )
    return EncodedData(dataset=dataset, stats=stats, rows=tuple(kept), row_numbers=tuple(numbers))


def _counted(rows: list[EncodedRow]) -> DataStats:
    lengths = [len(row.input_ids) for row in rows]
    return DataStats(
        n_rows=len(rows),
        n_sequences=len(rows),
        n_tokens=sum(lengths),
        n_supervised_tokens=sum(row.n_supervised for row in rows),
        max_tokens=max(lengths),
        percentiles=_percentiles(lengths),
    )


def _has_messages(row: Mapping[str, Any]) -> bool:
    return not is_missing(row.get("messages")) or isinstance(row.get("prompt"), list)


def _reasons(skipped: Mapping[str, int]) -> str:
    return ", ".join(f"{n} x {reason}" for reason, n in skipped.items())


def _percentiles(lengths: list[int]) -> tuple[int, int, int, int, int]:
    ordered = sorted(lengths)
    a, b, c, d, e = (ordered[round(p * (len(ordered) - 1))] for p in (0.05, 0.25, 0.5, 0.75, 0.95))
    return a, b, c, d, e


def _dataset(rows: list[EncodedRow], max_length: int, packing: bool) -> Any:
    from datasets import Dataset

    dataset = Dataset.from_dict({"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]})
    if not packing:
        return dataset
    from trl import pack_dataset

    with no_progress_bars():
        return pack_dataset(dataset, max_length, strategy="bfd")
