"""Bytes, seconds and counts as text, with the edges where a unit changes."""

import pytest

from nbqlora.core.units import GIB, MIB, format_bytes, format_count, format_minutes, format_seconds, gib


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 MiB"), (1, "0 KiB"), (600, "1 KiB"), (100 << 10, "100 KiB"), (MIB // 2, "512 KiB"), (MIB, "1 MiB"),
        (8 * MIB, "8 MiB"),
        (10 * MIB - 1, "10 MiB"), (10 * MIB, "0.01 GiB"), (int(0.04 * GIB), "0.04 GiB"), (int(0.994 * GIB), "0.99 GiB"),
        (int(0.996 * GIB), "1.0 GiB"), (int(13.34 * GIB), "13.3 GiB"), (int(99.96 * GIB), "100 GiB"),
        (1234 * GIB, "1234 GiB"), (-2 * GIB, "-2.0 GiB"),
    ],
)  # fmt: skip
def test_bytes(n_bytes: int, text: str) -> None:
    assert format_bytes(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (0.84, "0.8 s"), (9.94, "9.9 s"), (9.96, "10 s"), (42.4, "42 s"), (59.4, "59 s"),
        (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3599.4, "59 min 59 s"), (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"), (360_000, "100 h 00 min"),
    ],
)  # fmt: skip
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "under 1 min"), (59.9, "under 1 min"), (60, "about 1 min"), (41 * 60, "about 41 min"),
        (89.4 * 60, "about 89 min"),
        (89.6 * 60, "about 1 h 30 min"), (119.9 * 60, "about 2 h 00 min"), (200 * 60, "about 3 h 20 min"),
    ],
)  # fmt: skip
def test_minutes(seconds: float, text: str) -> None:
    assert format_minutes(seconds) == text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"), (812, "812"), (9999, "9999"), (9999.6, "10.0k"), (13_400, "13.4k"), (99_960, "100k"),
        (134_515, "135k"), (999_499, "999k"), (999_500, "1.0M"), (134_515_008, "135M"), (999_600_000, "1.00B"),
        (8_030_261_248, "8.03B"), (70e9, "70.00B"),
    ],
)  # fmt: skip
def test_counts(n: float, text: str) -> None:
    assert format_count(n) == text


def test_gib() -> None:
    assert gib(3 * GIB // 2) == 1.5
