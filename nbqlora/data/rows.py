"""Rows from a file, a hub data set, a list, a DataFrame or a ``datasets.Dataset``.

A row is a mapping with ``messages``, or with ``prompt`` and ``completion``. What cannot be read is a
:class:`DataError` that names the place, never an empty data set.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError

DEMO = "demo"
ACCEPTED = 'rows need "messages", or "prompt" and "completion"'


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows as read, not yet looked into.

    Args:
        rows: one mapping a row.
        source: what they came from, for plans and errors.
    """

    rows: Sequence[Mapping[str, Any]]
    source: str


def read_rows(source: Any, *, split: str = "train") -> Rows:
    """Read rows from whatever the user gave.

    Args:
        source: ``"demo"``, a path to a JSONL file, a hub data set's name, a list of mappings, a pandas
            DataFrame, or a ``datasets.Dataset`` (of a ``DatasetDict``, the split named ``split``).
        split: which split of ``"demo"``, of a hub data set or of a ``DatasetDict``.

    Raises:
        DataError: it is missing, cannot be read, or holds no rows.
    """
    if isinstance(source, str):
        rows = _read_named(source, split)
    elif isinstance(source, Rows):
        rows = source
    else:
        rows = _read_object(source, split)
    if not rows.rows:
        raise DataError(f"{rows.source} holds no rows; {ACCEPTED}")
    return rows


def _read_named(name: str, split: str) -> Rows:
    if name == DEMO:
        file = resources.files("nbqlora.data") / "demo" / ("train.jsonl" if split == "train" else "eval.jsonl")
        return Rows(rows=_parse_jsonl(file.read_bytes(), f"demo ({split})"), source=f"demo ({split})")
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".ndjson"):
            raise DataError(f"{name}: only JSONL files (one JSON object a line) are read for now, got {path.suffix!r}")
        return Rows(rows=_parse_jsonl(path.read_bytes(), name), source=path.name)
    if path.is_dir():
        raise DataError(f"{name} is a folder; give the file in it")
    if path.suffix or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DataError(_missing_file(path, name))
    return _read_hub(name, split)


def _missing_file(path: Path, name: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"no such file: {name}; the folder {folder} does not exist either"
    close = get_close_matches(path.name, [p.name for p in folder.iterdir() if p.is_file()], n=1)
    hint = f"; that folder has {close[0]}" if close else f"; looked in {folder.resolve()}"
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
        except json.JSONDecodeError as error:
            raise DataError(f"{name}, line {number}: not JSON: {error.msg} (column {error.colno})") from None
        if not isinstance(row, dict):
            raise DataError(f"{name}, line {number}: expected a JSON object, got {type(row).__name__}; {ACCEPTED}")
        rows.append(row)
    return rows


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    bars = datasets.utils.logging.is_progress_bar_enabled()
    try:
        datasets.disable_progress_bars()
        return Rows(rows=datasets.load_dataset(name, split=split), source=f"{name} ({split})")
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(f"{name} is neither a file here nor a data set that the hub gave: {reason}") from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def _read_object(source: Any, split: str) -> Rows:
    kind = type(source).__name__
    if isinstance(source, Mapping) and not hasattr(source, "column_names"):
        raise DataError(f"got one {kind}; expected a list of them; {ACCEPTED}")
    if hasattr(source, "to_dict") and hasattr(source, "columns"):
        rows = source.to_dict(orient="records")
        return Rows(rows=rows, source=f"DataFrame of {len(rows)} rows")
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f'the {kind} has no split "{split}"; it has {", ".join(map(str, source))}')
        return _read_object(source[split], split)
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        return Rows(rows=source, source=f"{kind} of {len(source)} rows")
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
