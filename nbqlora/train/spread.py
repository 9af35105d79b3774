"""Which rows of a step go to which rank: the step's rows are those that one card would take, dealt so that all finish
together.

The order of an epoch is the sampler's, and a step is its next ``effective_batch_size`` rows, whatever the number of
ranks: so a checkpoint of one card goes on on two, and back, and no row is seen twice or left out. Within a step the
order does not matter for the loss, which is a sum over its tokens. There the longest rows come first and are dealt back
and forth, as cards are: micro-batches that run at the same time hold rows of about the same length.

Every rank has as many micro-batches as the others, since they agree after each on whether memory was short. Where a
step's rows are too few, a rank without any gets two tokens that teach nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from nbqlora.engine.head import IGNORED
from nbqlora.train.ranks import Ranks

FILLING_TOKENS = 2


class SpreadBatches:
    """One rank's micro-batches of an epoch, as places in the data.

    Args:
        whole: the batches of a process alone; their order, and whether a last incomplete one is dropped, is kept.
        lengths: tokens of each row.
        rows: of a step, on all ranks.
        batch_size: most rows of a micro-batch.
        accumulation: micro-batches of a step, on each rank.
    """

    def __init__(
        self, whole: Any, lengths: Sequence[int], ranks: Ranks, *, rows: int, batch_size: int, accumulation: int
    ) -> None:
        self._whole, self._lengths, self._ranks = whole, lengths, ranks
        self._rows, self.batch_size, self._accumulation = rows, batch_size, accumulation
        self.drop_last = False
        # Where accelerate looks for what it tells the epoch, behind batches that it skips.
        self.sampler = self

    def __len__(self) -> int:
        steps, rest = divmod(self._n_rows(), self._rows)
        return steps * self._accumulation + self._micro_batches(rest)

    def __iter__(self) -> Iterator[list[int]]:
        places = self._ranks.firsts([place for batch in self._whole for place in batch])
        for begin in range(0, len(places), self._rows):
            of_step = places[begin : begin + self._rows]
            n = self._accumulation if len(of_step) == self._rows else self._micro_batches(len(of_step))
            for of_ranks in deal(of_step, [self._lengths[i] for i in of_step], n_ranks=self._ranks.n, n_batches=n):
                yield of_ranks[self._ranks.number] or [len(self._lengths)]

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's order comes next."""
        if hasattr(self._whole.sampler, "set_epoch"):
            self._whole.sampler.set_epoch(epoch)

    def _n_rows(self) -> int:
        whole = self._whole
        n = len(whole.sampler)
        return n - n % whole.batch_size if whole.drop_last else n

    def _micro_batches(self, rows: int) -> int:
        """Of each rank, for the rows of a step that is not full."""
        return -(-rows // (self._ranks.n * self.batch_size))


class EvalBatches:
    """One rank's batches of an evaluation: every so manieth of those of a process alone.

    Args:
        n_rows: of the data; the place behind them fills up.
    """

    def __init__(self, whole: Any, n_rows: int, ranks: Ranks) -> None:
        self._whole, self._n_rows, self._ranks = whole, n_rows, ranks
        self.batch_size, self.drop_last = whole.batch_size, False

    def __len__(self) -> int:
        return math.ceil(len(self._whole) / self._ranks.n)

    def __iter__(self) -> Iterator[list[int]]:
        mine = list(self._whole)[self._ranks.number :: self._ranks.n]
        yield from mine
        if len(mine) < len(self):
            yield [self._n_rows]


class Filled:
    """The data with one row more, whose few tokens are not learned."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self._data[place]) if place < len(self._data) else self._filling()

    def __getitems__(self, places: list[int]) -> list[dict[str, Any]]:
        return [self[place] for place in places]

    def _filling(self) -> dict[str, Any]:
        ids = self._data[0]["input_ids"][:FILLING_TOKENS]
        row = {"input_ids": ids, "labels": [IGNORED] * len(ids)}
        return {**row, "seq_lengths": [len(ids)]} if "seq_lengths" in self._data.column_names else row


def deal(places: Sequence[int], lengths: Sequence[int], *, n_ranks: int, n_batches: int) -> list[list[list[int]]]:
    """Rows dealt out, the longest first.

    Returns:
        For each micro-batch the places of each rank; as many in each as can be, or one fewer.
    """
    order = sorted(range(len(places)), key=lambda i: (-lengths[i], i))
    cells = n_ranks * n_batches
    sizes = [len(places) // cells + (cell < len(places) % cells) for cell in range(cells)]
    dealt, at = [], 0
    for batch in range(n_batches):
        room = sizes[batch * n_ranks : (batch + 1) * n_ranks]
        hands: list[list[int]] = [[] for _ in room]
        for turn in range(max(room)):
            players = [rank for rank in range(n_ranks) if len(hands[rank]) < room[rank]]
            for rank in players if turn % 2 == 0 else reversed(players):
                hands[rank].append(places[order[at]])
                at += 1
        dealt.append(hands)
    return dealt


def row_lengths(data: Any) -> list[int]:
    """Tokens of each row of a ``datasets.Dataset``, from its tables; no row is read."""
    tables = data.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    found = [np.diff(table.column("input_ids").combine_chunks().offsets.to_numpy()) for table in tables]
    lengths: list[int] = np.concatenate(found).tolist()
    return lengths


def with_batches(loader: Any, batches: Any) -> DataLoader[Any]:
    """A loader as this one of accelerate is, for other batches of its data, which may ask for the filling row."""
    inner = loader.base_dataloader
    workers: dict[str, Any] = {}
    if inner.num_workers:
        names = ("multiprocessing_context", "prefetch_factor", "persistent_workers")
        workers = {name: getattr(inner, name) for name in names}
    return DataLoader(
        Filled(inner.dataset),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=inner.collate_fn,
        num_workers=inner.num_workers,
        pin_memory=inner.pin_memory,
        worker_init_fn=inner.worker_init_fn,
        **workers,
    )
