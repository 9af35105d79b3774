"""A name on disk -> rows: which file, of which kind, and that it stays the same while it is read.

Data is read more than once (its first rows for the format, all of it for the tokens), and for minutes where
it is large. A file that another program writes meanwhile would give a data set that never was: its size and
the time of its last change are compared before and after every read, and whenever a read fails.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from nbqlora.core.errors import DataError
from nbqlora.core.units import format_bytes
from nbqlora.data.source import Numbered, Rows
from nbqlora.data.tables import n_rows_of_parquet, read_csv, read_parquet
from nbqlora.data.text_files import is_json_lines, load_json, read_jsonl

Reader = Callable[[Path, str], Numbered]
State = tuple[int, int]  # size in bytes, time of the last change in nanoseconds

# .json is not here: it is JSONL under another name, or parsed whole.
LINE_READERS: dict[str, Reader] = {
    ".jsonl": read_jsonl, ".ndjson": read_jsonl, ".csv": read_csv, ".tsv": read_csv,
}  # fmt: skip
TEXT_SUFFIXES = (*LINE_READERS, ".json")
READABLE = ".jsonl, .json, .csv, .tsv or .parquet"
# What to do with the other files that people have.
OTHER_FILES = {
    **dict.fromkeys((".xlsx", ".xls", ".ods"), 'rows = pandas.read_excel("{name}") in a cell, then data = "$rows"'),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z"), "unpack it first"),
    ".txt": 'write each text as {{"text": "..."}} on a line of a .jsonl file',
}
# What files of evaluation rows are called, best first.
EVAL_WORDS = ("eval", "evaluation", "validation", "valid", "val", "dev", "test")


def open_file(path: Path, name: str) -> Rows:
    """Look at a file and, where that is cheap, count its rows.

    Args:
        name: the path as the user wrote it.

    Raises:
        DataError: it is of no kind that is read, or what is read at once cannot be.
    """
    suffix = data_suffix(path)
    if not suffix:
        raise DataError(_other_file(path, name))
    before = _state(path)
    reader, n_rows, unit = LINE_READERS.get(suffix, read_jsonl), None, "line"
    with _unchanged(path, name, before):
        if suffix == ".json" and not is_json_lines(path):
            rows = load_json(path, name)
            return Rows(source=path.name, n_rows=len(rows), read=lambda: enumerate(rows, start=1), unit="row")
        if suffix == ".parquet":
            reader, n_rows, unit = read_parquet, n_rows_of_parquet(path, name), "row"
    return Rows(source=path.name, n_rows=n_rows, read=partial(_read, reader, path, name, before), unit=unit)


def open_folder(folder: Path, name: str, split: str) -> Rows:
    """All files of a folder, one after another; where some are named for evaluation, those of the split.

    Raises:
        DataError: it holds no data file, or several kinds of them.
    """
    files = sorted(p for p in folder.iterdir() if p.is_file() and data_suffix(p) and not p.name.startswith("."))
    if not files:
        deeper = next((p.parent for p in sorted(folder.rglob("*")) if p.is_file() and data_suffix(p)), None)
        hint = f"; there are some in {deeper}" if deeper else ""
        raise DataError(f"{name} is a folder without data files ({READABLE}){hint}")
    files = _of_split(files, split, name)
    kinds = sorted({data_suffix(p) for p in files})
    if len(kinds) > 1:
        raise DataError(f"{name} holds {' and '.join(kinds)} files; give one of them, for example {files[0]}")
    parts = [open_file(path, str(path)) for path in files]
    if len(parts) == 1:
        return replace(parts[0], source=f"{folder.name}/{parts[0].source}")
    counts = [part.n_rows for part in parts if part.n_rows is not None]
    return Rows(
        source=f"{folder.name} ({len(parts)} {kinds[0]} files)",
        n_rows=sum(counts) if len(counts) == len(parts) else None,
        read=lambda: enumerate((row for part in parts for _, row in part.read()), start=1),
        unit="row",
    )


def _of_split(files: Sequence[Path], split: str, name: str) -> list[Path]:
    """The files to train on, or to evaluate on, as their names tell."""
    words = {path: re.findall("[a-z]+", path.name.lower()) for path in files}
    if split == "train":
        return [p for p in files if not set(words[p]) & set(EVAL_WORDS)] or list(files)
    for word in EVAL_WORDS:
        if found := [p for p in files if word in words[p]]:
            return found
    found = [p for p in files if "train" not in words[p]]
    if not found:
        raise DataError(f"{name} has no file for evaluation (named eval, validation or test); it has {files[0].name}")
    return found


def data_suffix(path: Path) -> str:
    """``.csv`` of rows.csv and of rows.csv.gz; "" for what is not read."""
    name = path.name.lower()
    suffix = Path(name.removesuffix(".gz")).suffix
    known = suffix in TEXT_SUFFIXES or (suffix == ".parquet" and not name.endswith(".gz"))
    return suffix if known else ""


def _other_file(path: Path, name: str) -> str:
    suffix = path.suffix.lower()
    hint = OTHER_FILES.get(suffix, "")
    return f"{name}: got {suffix or 'no suffix'}, expected {READABLE}" + (f"; {hint.format(name=name)}" if hint else "")


def missing_file(path: Path, name: str) -> str:
    """The message for a file that is not there, with the nearest one that is."""
    folder, forward = path.parent, name.replace("\\", "/")
    if forward != name and Path(forward).exists():
        return f"no such file: {name}; write {forward}"
    if not folder.is_dir():
        return f"no such file: {name}; the folder {folder} does not exist either"
    close = get_close_matches(path.name, [p.name for p in folder.iterdir() if p.is_file()], n=1)
    which = "this" if folder == Path() else "that"
    hint = f"; {which} folder has {close[0]}" if close else f"; looked in {folder.resolve()}"
    return f"no such file: {name}{hint}"


def _read(reader: Reader, path: Path, name: str, before: State) -> Numbered:
    with _unchanged(path, name, before):
        yield from reader(path, name)


@contextmanager
def _unchanged(path: Path, name: str, before: State) -> Iterator[None]:
    """Raise :class:`DataError` where the file is another at either end, and for errors within that are the file's."""
    _check_same(path, name, before)
    try:
        yield
    except (OSError, EOFError, zlib.error, DataError) as error:
        # A change explains whatever went wrong.
        _check_same(path, name, before)
        if isinstance(error, DataError):
            raise
        raise DataError(f"cannot read {name}: {error}") from error
    _check_same(path, name, before)


def _state(path: Path) -> State:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _check_same(path: Path, name: str, before: State) -> None:
    try:
        now = _state(path)
    except FileNotFoundError:
        raise DataError(
            f"{name} is gone: it was there when reading began; put it back and run the cell again"
        ) from None
    if now == before:
        return
    sizes = format_bytes(before[0]), format_bytes(now[0])
    grown = now[0] - before[0]
    change = "written anew, as large as before" if not grown else f"{grown:+d} bytes"
    raise DataError(
        f"{name} changed while it was read ({' -> '.join(sizes) if sizes[0] != sizes[1] else change}); "
        "run the cell again"
    )
