"""Time and memory: 100,000 rows in less than a minute, and memory that does not grow with their number."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nbqlora.data.encode import EncodedData, encode
from nbqlora.data.source import Rows
from tests.data.small_rows import PACKED, pair
from tests.data.small_tokenizers import words


def conversations(n: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Two turns each, about 150 tokens."""
    text = " ".join(f"The answer to question {i} is that it depends on the river." for i in range(6)).split()
    for number in range(1, n + 1):
        at = number % 30
        said = (f"{number} {' '.join(text[at : at + k])}" for k in (12, 31, 10, 31))
        yield (
            number,
            {
                "messages": [
                    {"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, said, strict=True)
                ]
            },
        )


def timed(n: int, tokenizer: Any) -> tuple[float, EncodedData]:
    begun = time.perf_counter()
    rows = Rows(source="x", n_rows=n, read=lambda: conversations(n))
    data = encode(rows, tokenizer, max_length=1024, layout=PACKED)
    return time.perf_counter() - begun, data


def test_two_thousand_rows_take_seconds(demo_tokenizer: Any) -> None:
    seconds, data = timed(2000, demo_tokenizer)
    assert data.stats.n_rows == 2000
    assert seconds < 8


@pytest.mark.slow
def test_a_hundred_thousand_rows_take_less_than_a_minute(demo_tokenizer: Any) -> None:
    seconds, data = timed(100_000, demo_tokenizer)
    print(f"100,000 rows of {data.stats.mean_tokens:.0f} tokens with report and packing: {seconds:.1f} s")
    assert 130 < data.stats.mean_tokens < 170
    assert data.report.n_read == 100_000
    assert seconds < 60


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows() -> None:
    tokenizer = words()

    def grown(n: int) -> int:
        """Bytes of the process's own memory (not of files) after ``n`` rows of 21 tokens."""
        rows = Rows(source="x", n_rows=None, read=lambda: ((i, pair(10, 10, first=i)) for i in range(1, n + 1)))
        before = _own_bytes()
        data = encode(rows, tokenizer, max_length=32, layout=PACKED)
        assert data.stats.n_rows == n
        return _own_bytes() - before

    grown(20_000)
    small, large = grown(20_000), grown(200_000)
    print(f"own memory after 20,000 rows {small / 2**20:.1f} MiB, after 200,000 {large / 2**20:.1f} MiB")
    # The tokens and labels of the difference are 30 MB, as Python's numbers 240 MB.
    assert large - small < 15 * 2**20


def _own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
