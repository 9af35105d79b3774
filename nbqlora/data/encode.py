"""Rows -> the data set that the trainer takes as it is, and the counts that a plan needs.

Rows stream: a few hundred at a time are converted, rendered, tokenized (in threads, since the tokenizers let go
of Python meanwhile) and written to a temporary folder, so that memory does not grow with their number. Packing
is TRL's best-fit packing, done here rather than in the trainer: the number of packs decides the number of
steps, and a plan must know it before anything is loaded.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from nbqlora.core.data_report import DataReport
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.core.units import format_minutes
from nbqlora.data import arrow
from nbqlora.data.formats import Format, detect_format
from nbqlora.data.messages import RowError
from nbqlora.data.render import Renderer
from nbqlora.data.report import Tally
from nbqlora.data.rows import Rows, no_progress_bars
from nbqlora.data.scratch import ScratchFolder
from nbqlora.data.template import check_tokenizer
from nbqlora.data.tokens import EncodedRow, encode_rendered, quiet_tokenizers

# The format is found, and bad data noticed, from so many rows.
FIRST_ROWS = 100
_CHUNK_ROWS = 250
_MOST_THREADS = 8
_SAY_SECONDS = 5.0

_Numbered = tuple[int, Mapping[str, Any]]
_Result = tuple[int, "EncodedRow | RowError"]


@dataclass(frozen=True, kw_only=True)
class _Store:
    """Where the rows are: args: rows: unpacked, with their numbers; padded_fill: their ``fill`` when padded."""

    rows: Any
    folder: ScratchFolder
    max_length: int
    padded_fill: float


@dataclass(frozen=True, kw_only=True, repr=False)
class EncodedData:
    """Token ids and labels, ready for the trainer; on disk, in a folder that goes when this does.

    Args:
        dataset: ``datasets.Dataset`` with ``input_ids`` and ``labels``, each ``[seq]``, int32, and when packed
            ``seq_lengths``, the documents' lengths in order.
        report: what is in the data, for people.
    """

    dataset: Any
    stats: DataStats
    report: DataReport
    store: _Store

    def __repr__(self) -> str:
        return f"EncodedData({self.stats.source}: {self.stats.n_rows} rows, {self.stats.n_tokens} tokens)"

    def find_rows(self, documents: Sequence[Sequence[int]]) -> tuple[int, ...]:
        """Numbers in the source of the rows with these token ids; a failing batch is named by them."""
        return arrow.find_rows(self.store.rows, documents)

    def with_layout(self, layout: BatchLayout, because: str) -> EncodedData:
        """The same rows laid out otherwise; nothing is tokenized again.

        Args:
            because: why, for the plan.

        Raises:
            OutOfDiskError: there is no room for the packs.
        """
        dataset, fill = self.store.rows.select_columns(["input_ids", "labels"]), 1.0
        if layout is BatchLayout.PADDED:
            fill = self.store.padded_fill
        elif layout is BatchLayout.PACKED:
            if self.stats.layout is BatchLayout.PACKED:
                dataset = self.dataset
            else:
                with no_progress_bars():
                    dataset = arrow.pack(dataset, self.store.max_length, self.store.folder.new_file("packs"))
            fill = self.stats.n_tokens / (len(dataset) * self.store.max_length)
        stats = replace(self.stats, layout=layout, layout_because=because, n_sequences=len(dataset))
        return replace(self, dataset=dataset, stats=stats, report=replace(self.report, stats=stats, fill=fill))

    def handed_on(self) -> HandedRows:
        """What another process of this machine opens; good while this object lives, and not for packs."""
        (file,) = (Path(part["filename"]) for part in self.store.rows.cache_files)
        long, fill = self.store.max_length, self.store.padded_fill
        return HandedRows(file=file, stats=self.stats, report=self.report, max_length=long, padded_fill=fill)


@dataclass(frozen=True, kw_only=True, repr=False)
class HandedRows:
    """Rows that another process tokenized and still owns; the other fields are those of its ``EncodedData``."""

    file: Path
    stats: DataStats
    report: DataReport
    max_length: int
    padded_fill: float

    def opened(self) -> EncodedData:
        """The same rows, read through the page cache; packs that are made of them lie in this process's own folder."""
        rows, fill = arrow.open_rows(self.file), self.padded_fill
        store = _Store(rows=rows, folder=ScratchFolder(), max_length=self.max_length, padded_fill=fill)
        return EncodedData(dataset=rows, stats=self.stats, report=self.report, store=store)


def encode(
    rows: Rows,
    tokenizer: Any,
    *,
    max_length: int,
    assistant_only_loss: bool = True,
    layout: BatchLayout,
    say: Callable[[str], None] | None = None,
) -> EncodedData:
    """Tokenize, cut at ``max_length``, count and lay out.

    Args:
        max_length: tokens that a row, or a pack, may have.
        layout: how the rows of a micro-batch will lie.
        say: takes a line of progress, every few seconds.

    Raises:
        DataError: the rows cannot be read, none of the first hundred or fewer than half of all can be used,
            the tokenizer gives no offsets, or there are conversations and no chat template.
        OutOfDiskError: the tokens have no room in the temporary folder.
    """
    check_tokenizer(tokenizer)
    numbered = iter(rows)
    first = list(islice(numbered, FIRST_ROWS))
    tally, progress = Tally(rows.source, rows.unit, max_length), _Progress(say, rows.n_rows, rows.unit)
    if not first:
        tally.check()
    found = detect_format([row for _, row in first], rows.source)
    renderer = Renderer(tokenizer, assistant_only_loss=assistant_only_loss)
    folder = ScratchFolder()
    file = folder.new_file("rows")
    try:
        results = _results(_chunks(first, numbered), found, renderer, tokenizer)
        with arrow.RowWriter(file) as writer, quiet_tokenizers(), closing(results):
            _take_all(results, tally, writer, progress)
        tally.check()
        return _laid_out(tally, found, file, folder, max_length, tokenizer).with_layout(layout, "")
    except BaseException:
        folder.remove()
        raise


def _laid_out(
    tally: Tally, found: Format, file: Path, folder: ScratchFolder, max_length: int, tokenizer: Any
) -> EncodedData:
    rows, stats = arrow.open_rows(file), tally.stats(found.title)
    report = tally.report(stats, rows, tokenizer)
    store = _Store(rows=rows, folder=folder, max_length=max_length, padded_fill=report.fill)
    return EncodedData(dataset=rows, stats=stats, report=report, store=store)


def _take_all(results: Iterable[list[_Result]], tally: Tally, writer: arrow.RowWriter, progress: _Progress) -> None:
    """Count each row, and write those that are kept."""
    for chunk in results:
        numbers, kept = [], []
        for number, result in chunk:
            if isinstance(result, RowError):
                tally.skip(number, result.reason)
            elif (short := tally.keep(number, result)) is not None:
                numbers.append(number)
                kept.append(short)
        writer.write(numbers, kept)
        tally.check_start(FIRST_ROWS)
        progress.at(tally.n_read)


def _chunks(first: list[_Numbered], others: Iterator[_Numbered]) -> Iterator[list[_Numbered]]:
    """The first rows by themselves: when none of them is of use, the others are not read."""
    return chain([first], iter(lambda: list(islice(others, _CHUNK_ROWS)), []))


def _results(
    chunks: Iterator[list[_Numbered]], found: Format, renderer: Renderer, tokenizer: Any
) -> Generator[list[_Result], None, None]:
    """The rows of each chunk, encoded, in order; a few chunks at a time are on their way."""
    # The first call sets the tokenizer's own options, which must not change under another one.
    tokenizer("")
    n_threads = min(_MOST_THREADS, os.cpu_count() or 1)
    waiting: deque[tuple[list[int], Future[list[EncodedRow | RowError]]]] = deque()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="nbqlora-tokens") as threads:
        try:
            for chunk in chunks:
                rendered = _rendered([row for _, row in chunk], found, renderer)
                waiting.append(([number for number, _ in chunk], threads.submit(encode_rendered, rendered, tokenizer)))
                # The first chunk is waited for: it may be the last.
                while len(waiting) > n_threads or (waiting and len(waiting[0][0]) == FIRST_ROWS):
                    numbers, done = waiting.popleft()
                    yield list(zip(numbers, done.result(), strict=True))
            for numbers, done in waiting:
                yield list(zip(numbers, done.result(), strict=True))
        finally:
            threads.shutdown(cancel_futures=True)


def _rendered(rows: Sequence[Mapping[str, Any]], found: Format, renderer: Renderer) -> list[Any]:
    """Each row as text, or why not."""
    converted: list[Any] = []
    for row in rows:
        try:
            converted.append(found.convert(row))
        except RowError as error:
            converted.append(error)
    rendered = iter(renderer([row for row in converted if not isinstance(row, RowError)]))
    return [row if isinstance(row, RowError) else next(rendered) for row in converted]


class _Progress:
    """Says every few seconds how far it is; nothing where it is done before."""

    def __init__(self, say: Callable[[str], None] | None, n_rows: int | None, unit: str) -> None:
        self._say, self._n_rows, self._unit = say, n_rows, unit
        self._begun = self._said = time.monotonic()

    def at(self, n_read: int) -> None:
        now = time.monotonic()
        if self._say is None or now - self._said < _SAY_SECONDS:
            return
        self._said = now
        text = f"tokenized {n_read:,} {self._unit}s"
        if self._n_rows:
            left = (now - self._begun) * max(0, self._n_rows - n_read) / n_read
            text = f"tokenized {n_read:,} of {self._n_rows:,} {self._unit}s, {format_minutes(left)} left"
        self._say(text)
