"""What the data report counts: lengths, cuts, duplicates, reasons, padding, and the rows that it shows."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from nbqlora.core.data_report import PADDED_ROWS, DataReport, listed
from nbqlora.core.specs import BatchLayout
from nbqlora.data.encode import encode
from nbqlora.data.report import CUT_AWAY, OTHER_REASONS, Tally, histogram, padded_fill, repeated
from nbqlora.data.rows import read_rows
from nbqlora.data.tokens import EncodedRow
from tests.data.small_rows import pair
from tests.data.small_tokenizers import byte_level, words


def reported(rows: Any, *, max_length: int = 64, tokenizer: Any = None, **options: Any) -> DataReport:
    options.setdefault("layout", BatchLayout.PADDED)
    return encode(read_rows(rows), tokenizer or words(), max_length=max_length, **options).report


def test_what_is_cut_and_left_out() -> None:
    rows = [pair(3, 2), pair(3, 20), pair(20, 3), pair(2, 8), {"prompt": "a", "completion": None}, pair(1, 1)]
    report = reported(rows, max_length=10)
    assert (report.n_read, report.stats.n_rows, report.stats.n_truncated) == (6, 4, 2)
    # Of 24 tokens 14, and of 11 tokens one.
    assert (report.n_cut_tokens, report.n_cut_learned) == (15, 15)
    assert {s.reason: (s.count, s.rows) for s in report.skipped} == {
        CUT_AWAY: (1, (3,)),
        "nothing (None or NaN) in completion": (1, (5,)),
    }
    assert report.max_length == 10
    # Before the cut, and with the row whose answer was cut away: 3, 6, 11, 24 and 24 tokens.
    assert [sum(n for low, high, n in report.histogram if low <= at <= high) for at in (3, 6, 11, 24)] == [1, 1, 1, 2]
    assert sum(n for _, _, n in report.histogram) == 5


def test_duplicates_are_counted_and_kept() -> None:
    rows = [pair(1, 2), pair(2, 1), pair(1, 2), pair(1, 3), pair(1, 2), pair(1, 3)]
    report = reported(rows)
    # The first and the second row have the same tokens, and teach others.
    assert (report.n_duplicates, report.duplicate_rows) == (4, (2, 3, 5, 6))
    assert report.stats.n_rows == 6
    many = reported([pair(1, 2)] * 30)
    assert (many.n_duplicates, many.duplicate_rows) == (29, (2, 3, 4, 5, 6))
    assert reported([pair(1, 2, first=i) for i in range(30)]).n_duplicates == 0


def test_repeated_values_are_all_but_the_first() -> None:
    values = np.array([7, 3, 7, 7, 9, 3], dtype=np.uint64)
    assert repeated(values).tolist() == [2, 3, 5]
    numbers = np.random.default_rng(0).integers(0, 500, 2000).astype(np.uint64)
    seen: set[int] = set()
    expected = [i for i, n in enumerate(numbers.tolist()) if n in seen or seen.add(n)]
    assert repeated(numbers).tolist() == expected


@pytest.mark.parametrize(
    ("lengths", "bins"),
    [
        ([7], [(7, 7, 1)]),
        ([1, 2, 3], [(1, 1, 1), (2, 2, 1), (3, 3, 1)]),
        ([0, 5], [(0, 0, 1), (1, 1, 0), (2, 2, 0), (3, 3, 0), (4, 4, 0), (5, 5, 1)]),
        ([3, 40, 99], [(1, 9, 1), *((n, n + 9, int(n == 40 or n == 90)) for n in range(10, 100, 10))]),
        # One row in a thousand is very long: it does not squeeze the others into one bin.
        ([*[20] * 500, *[60] * 499, 30_000], [(20, 24, 500), *((n, n + 4, 0) for n in range(25, 60, 5)),
                                              (60, 64, 499), (65, 30_000, 1)]),
    ],
)  # fmt: skip
def test_histogram(lengths: list[int], bins: list[tuple[int, int, int]]) -> None:
    assert list(histogram(np.array(lengths, dtype=np.int32))) == bins


def test_any_lengths_fall_into_a_dozen_bins_without_gaps() -> None:
    numbers = np.random.default_rng(0)
    for size in (1, 2, 10, 1000):
        for scale in (3, 100, 5000):
            lengths = numbers.exponential(scale, size).astype(np.int32) + 1
            bins = histogram(lengths)
            assert len(bins) <= 14
            assert sum(n for _, _, n in bins) == size
            assert bins[0][0] <= lengths.min()
            assert lengths.max() <= bins[-1][1]
            assert all(a[1] + 1 == b[0] for a, b in pairwise(bins))


def test_padding_is_what_random_batches_would_have() -> None:
    numbers = np.random.default_rng(0)
    lengths = numbers.integers(1, 200, 500).astype(np.int32)
    batches = numbers.choice(lengths, (20_000, PADDED_ROWS))
    assert padded_fill(lengths) == pytest.approx(batches.sum() / (batches.max(axis=1).sum() * PADDED_ROWS), rel=0.01)
    assert padded_fill(np.array([5, 5, 5], dtype=np.int32)) == 1.0
    assert padded_fill(np.array([9], dtype=np.int32)) == 1.0


def test_the_rows_shown_are_the_first_the_middle_and_the_longest() -> None:
    tokenizer = byte_level("chatml")
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * n}]}
        for n in (2, 9, 5, 40, 7)
    ]
    report = reported(rows, tokenizer=tokenizer, max_length=30)
    first, middle, longest = report.previews
    assert (first.row, first.why, first.n_cut_tokens) == (1, "the first", 0)
    assert first.pieces == (
        ("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", False),
        ("bb<|im_end|>", True),
        ("\n", False),
    )
    assert (middle.row, middle.why) == (5, "of middle length")
    assert (longest.row, longest.why) == (4, "the longest")
    assert longest.n_tokens - longest.n_cut_tokens == 30
    assert longest.pieces[-1][1]
    assert longest.pieces[-1][0] == "b" * len(longest.pieces[-1][0])
    whole = reported(rows, tokenizer=tokenizer)
    assert [p.why for p in whole.previews] == ["the first", "of middle length"]
    assert [p.why for p in reported(rows[:1], tokenizer=tokenizer).previews] == ["the first"]


def test_no_row_of_the_user_reaches_a_file() -> None:
    report = reported([pair(1, 2)])
    assert report.previews
    assert "w1" not in str(report.as_dict())
    assert report.as_dict()["histogram"] == [[4, 4, 1]]


def test_many_different_reasons_stay_few() -> None:
    tally = Tally("x", "row", 8)
    for number in range(1, 501):
        tally.skip(number, f"reason {number % 100}")
    tokens = np.arange(4, dtype=np.int32)
    assert tally.keep(501, EncodedRow(input_ids=tokens, labels=tokens)) is not None
    skipped = tally.stats("text").n_skipped
    assert len(skipped) == 41
    assert skipped[OTHER_REASONS] == 300
    assert sum(skipped.values()) == 500


def test_row_numbers_read_as_a_list() -> None:
    assert listed((3,), 1, "row") == "row 3"
    assert listed((3, 70_000), 2, "line") == "lines 3 and 70,000"
    assert listed((1, 2, 3), 3, "row") == "rows 1, 2 and 3"
    assert listed((1, 2, 3), 9, "row") == "rows 1, 2, 3, …"
