"""Rows from a file, a hub data set, a list, a DataFrame or a ``datasets.Dataset``.

A row is a mapping with ``messages``, or with ``prompt`` and ``completion``. What cannot be read is a
:class:`DataError` that names the place, never an empty data set.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError

DEMO = "demo"
ACCEPTED = 'rows need "messages", or "prompt" and "completion"'
# What evaluation rows are called, best first.
EVAL_SPLITS = ("eval", "validation", "test")
# How to read what is not read here.
OTHER_READERS = {".csv": "read_csv", ".tsv": "read_table", ".parquet": "read_parquet", ".json": "read_json"}


@dataclass(frozen=True, kw_only=True, repr=False)
class Rows:
    """Rows as read, not yet looked into.

    Args:
        rows: one mapping a row.
        source: what they came from, for plans and errors.
    """

    rows: Sequence[Mapping[str, Any]]
    source: str

    def __repr__(self) -> str:
        return f"Rows({self.source}: {len(self.rows)} rows)"


def read_rows(source: Any, *, split: str = "train") -> Rows:
    """Read rows from whatever the user gave.

    Args:
        source: ``"demo"``, a path to a JSONL file, a hub data set's name, a list of mappings, a pandas
            DataFrame, or a ``datasets.Dataset`` (of a ``DatasetDict``, the split named ``split``).
        split: which split of ``"demo"``, of a hub data set or of a ``DatasetDict``: ``"train"``, or
            ``"eval"``, which there may also be called validation or test.

    Raises:
        DataError: it is missing, cannot be read, or holds no rows.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _read_named(os.fspath(source), split)
    elif isinstance(source, Rows):
        rows = source
    else:
        rows = _read_object(source, split)
    if not len(rows.rows):
        used_up = "; an iterator can be read only once: give a list" if isinstance(source, Iterator) else ""
        raise DataError(f"{rows.source} holds no rows{used_up}; {ACCEPTED}")
    return rows


def _read_named(name: str, split: str) -> Rows:
    if name == DEMO:
        file = resources.files("nbqlora.data") / "demo" / ("train.jsonl" if split == "train" else "eval.jsonl")
        return Rows(rows=_parse_jsonl(file.read_bytes(), f"demo ({split})"), source=f"demo ({split})")
    if len(name) > 1000 or "\n" in name or "\0" in name:
        raise DataError(f"expected a file or a data set's name, got text that begins {name[:40]!r}; {ACCEPTED}")
    try:
        path = Path(name).expanduser()
        if path.is_file():
            _check_suffix(path, name)
            return Rows(rows=_parse_jsonl(path.read_bytes(), name), source=path.name)
        if path.is_dir():
            raise DataError(f"{name} is a folder; give the file in it{_first_jsonl(path)}")
        if path.suffix[1:].isalpha() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError(_missing_file(path, name))
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~ without a home
        raise DataError(f"cannot read {name}: {error}") from error
    return _read_hub(name, split)


def _check_suffix(path: Path, name: str) -> None:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return
    hint = "one JSON object a line, in a file named .jsonl"
    if suffix in OTHER_READERS:
        hint = f'rows = pandas.{OTHER_READERS[suffix]}("{name}") in a cell, then data = "$rows"'
    raise DataError(f"{name}: only JSONL files are read, got {suffix or 'no suffix'}; expected {hint}")


def _first_jsonl(folder: Path) -> str:
    found = sorted(p.name for p in folder.glob("*.jsonl"))
    return f", for example {folder / found[0]}" if found else ""


def _missing_file(path: Path, name: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no such file: {name}; the folder {folder} does not exist either"
    close = get_close_matches(path.name, [p.name for p in folder.iterdir() if p.is_file()], n=1)
    which = "this" if folder == Path() else "that"
    hint = f"; {which} folder has {close[0]}" if close else f"; looked in {folder.resolve()}"
    return f"no such file: {name}{hint}"


def _parse_jsonl(content: bytes, name: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{name}, line {line}: not UTF-8 text ({error.reason}); save the file as UTF-8") from None
    for number, written in enumerate(text.split("\n"), start=1):
        if not written.strip():
            continue
        try:
            row = json.loads(written)
        except (ValueError, RecursionError) as error:
            hint = "; one row is one line of JSON" if written.strip() in ("[", "{") else ""
            raise DataError(f"{name}, line {number}: not JSON: {_why(error)}{hint}") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number}: expected a JSON object, got {type(row).__name__}; {ACCEPTED}")
        rows.append(row)
    return rows


def _why(error: Exception) -> str:
    return f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else str(error)


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        with no_progress_bars():
            if split != "train":
                split = _find_split(split, datasets.get_dataset_split_names(name), name)
            return Rows(rows=datasets.load_dataset(name, split=split), source=f"{name} ({split})")
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f'; for an object of the notebook write "${name}"' if name.isidentifier() else "; is there a network?"
        raise DataError(f"{name} is neither a file here nor a data set that the hub gave: {reason}{hint}") from error


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, ``datasets`` draws no bars: a cell's output is the run's own."""
    import datasets

    drawn = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if drawn:
            datasets.enable_progress_bars()


def _find_split(split: str, names: Iterable[Any], what: str) -> str:
    """The split's own name, or for evaluation another word for it."""
    has = list(map(str, names))
    found = [s for s in (EVAL_SPLITS if split == "eval" else (split,)) if s in has]
    if not found:
        raise DataError(f'{what} has no split "{split}"; it has {", ".join(has)}; give the rows of one of them')
    return found[0]


def _read_object(source: Any, split: str) -> Rows:
    kind = type(source).__name__
    if isinstance(source, Mapping):
        if not hasattr(source, "column_names"):
            raise DataError(f"got one {kind}; expected a list of dicts, one a row; {ACCEPTED}")
        name = _find_split(split, source, f"the {kind}")
        rows = _read_object(source[name], split)
        return Rows(rows=rows.rows, source=f"{name} of a {kind}")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        rows_of_frame = source.to_dict(orient="records")
        return Rows(rows=rows_of_frame, source=f"DataFrame of {len(rows_of_frame)} rows")
    if hasattr(source, "with_format") and hasattr(source, "__len__"):
        return Rows(rows=source.with_format(None), source=f"{kind} of {len(source)} rows")
    if isinstance(source, Iterable):
        return Rows(rows=_list_of_mappings(source, kind), source=f"{kind} of rows")
    raise DataError(f"cannot read rows from a {kind}; expected a file, a list of dicts, a DataFrame or a Dataset")


def _list_of_mappings(source: Iterable[Any], kind: str) -> list[Mapping[str, Any]]:
    rows: list[Mapping[str, Any]] = []
    for number, row in enumerate(source, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"row {number} of the {kind} is a {type(row).__name__}; expected a dict; {ACCEPTED}")
        rows.append(row)
    return rows
