"""Large files are read with little memory: a process of its own reads one and says how much it grew."""

import gzip
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from nbqlora.data.formats import detect_format
from nbqlora.data.rows import read_rows

# Reads and converts every row; prints their number and by how many MiB the first rows and the rest raised the peak.
READ = """
import sys
from itertools import islice
from nbqlora.data.formats import detect_format
from nbqlora.data.rows import read_rows

def peak():
    # Not getrusage: a process that was just started counts its parent's peak as its own there.
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) / 1024

rows = read_rows(sys.argv[1])
convert = detect_format([row for _, row in islice(rows, 100)], rows.source).convert
for _, row in islice(rows, 10_000):
    convert(row)
before, n = peak(), 0
for _, row in rows:
    convert(row)
    n += 1
print(n, round(peak() - before))
"""
INSTRUCTION, OUTPUT = "Say in short: what is this? " * 3, "It is a thing, and not another. " * 4
A_BATCH = 10_000


def write(path: Path, n_rows: int) -> None:
    """Rows that differ in one number; about 240 bytes each."""
    with gzip.open(path, "wb", compresslevel=1) if path.suffix == ".gz" else path.open("wb") as file:
        if path.suffix == ".csv":
            file.write(b"instruction,output\n")
        for start in range(0, n_rows, A_BATCH):
            for i in range(start, start + A_BATCH):
                row = {"instruction": f"{i} {INSTRUCTION}", "output": OUTPUT}
                line = f'"{row["instruction"]}","{OUTPUT}"' if path.suffix == ".csv" else json.dumps(row)
                file.write(f"{line}\n".encode())


def read_in_a_process(path: Path) -> tuple[int, int]:
    """Rows read, and MiB by which the rest of the file raised the peak over its first rows."""
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True, check=True)
    n, grown = map(int, done.stdout.split())
    return n, grown


pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the peak from Linux's /proc")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.jsonl.gz"])
def test_a_large_file_is_never_in_memory(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, 150_000)
    n, grown = read_in_a_process(path)
    # 36 MB of text, and twice that as Python objects.
    assert n == 150_000
    assert grown <= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_ten_million_rows(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write(path, 10_000_000)
    n, grown = read_in_a_process(path)
    assert n == 10_000_000
    assert grown <= 8


def test_a_large_parquet_file_is_read_by_row_groups(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    path = tmp_path / "rows.parquet"
    texts = [f"{i} {OUTPUT * 4}" for i in range(20_000)]
    table = Table.from_pydict({"instruction": texts, "output": texts})
    with parquet.ParquetWriter(path, table.schema, use_dictionary=False) as file:
        for _ in range(10):
            file.write_table(table, row_group_size=5000)
    n, grown = read_in_a_process(path)
    # 210 MB of text. Arrow's allocator keeps 16 to 58 MiB of it, more or less each time, of a file of any length.
    assert n == 200_000
    assert grown <= 90


def test_the_first_rows_of_a_large_file_are_there_before_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write(path, A_BATCH)
    with path.open("a") as file:
        file.write("{broken")
    rows = read_rows(path)
    first = [row for _, row in islice(rows, 100)]
    assert detect_format(first, rows.source).title == "Alpaca (instruction, output)"
    assert [number for number, _ in islice(rows, 5000, 5001)] == [5001]
