"""Rows from a file, a folder, a hub data set, a list, a DataFrame or a ``datasets.Dataset``.

Rows are handed out one after another, as they stand in the source: what is large is never in memory as a
whole, and what the rows hold is the matter of :mod:`nbqlora.data.formats`. What cannot be read is a
:class:`DataError` that names the place, never an empty data set.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.files import missing_file, open_file, open_folder
from nbqlora.data.objects import object_rows
from nbqlora.data.source import Rows

__all__ = ["ACCEPTED", "DEMO", "Rows", "no_progress_bars", "read_rows"]

DEMO = "demo"
ACCEPTED = (
    'rows need "messages", or "prompt" and "completion", or "instruction" and "output", or "conversations", or "text"'
)
# A data set's name on the hub.
HUB_DATA_SET = re.compile(r"([\w-][\w.-]*/)?[\w-][\w.-]*")
# What evaluation rows are called, best first.
EVAL_SPLITS = ("eval", "validation", "test")
# Files of a folder that ``datasets.save_to_disk`` wrote.
SAVED_DATASET = ("dataset_info.json", "dataset_dict.json")


def read_rows(source: Any, *, split: str = "train") -> Rows:
    """Rows from whatever the user gave; the first one is read to see that there is one.

    Args:
        source: ``"demo"``, a path (JSONL, JSON, CSV, TSV, Parquet, or a folder of one of them), a hub data set's
            name, a list of mappings, a DataFrame, an Arrow table, or a ``datasets`` object (of a ``DatasetDict``,
            the split named ``split``). An iterator is read once, into memory.
        split: which split of ``"demo"``, a folder, a hub data set or a ``DatasetDict``: ``"train"``, or
            ``"eval"``, which there may also be called validation or test.

    Raises:
        DataError: it is missing, holds no rows, or its first row cannot be read. Later rows raise when read.
    """
    if isinstance(source, (str, os.PathLike)):
        rows = _read_named(os.fspath(source), split)
    elif isinstance(source, Rows):
        rows = source
    else:
        rows = _read_object(source, split)
    if next(iter(rows), None) is None:
        used_up = "; an iterator can be read only once: give a list" if isinstance(source, Iterator) else ""
        raise DataError(f"{rows.source} holds no rows{used_up}; {ACCEPTED}")
    return rows


def _read_named(name: str, split: str) -> Rows:
    if name == DEMO:
        file = Path(__file__).parent / "demo" / ("train.jsonl" if split == "train" else "eval.jsonl")
        return replace(open_file(file, name), source=f"demo ({split})")
    if len(name) > 1000 or "\n" in name or "\0" in name:
        raise DataError(f"expected a file or a data set's name, got text that begins {name[:40]!r}; {ACCEPTED}")
    if "://" in name:
        raise DataError(f"{name} is an address; expected a file or a data set's name: download it first")
    try:
        path = Path(name).expanduser()
        if path.is_file():
            return open_file(path, name)
        if path.is_dir():
            return _read_folder(path, name, split)
        if path.suffix[1:].isalpha() or name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise DataError(missing_file(path, name))
    except (OSError, RuntimeError) as error:  # no permission, a name too long, ~ without a home
        raise DataError(f"cannot read {name}: {error}") from error
    if not HUB_DATA_SET.fullmatch(name):
        inner = name.strip("{}$ ")
        hint = f'; for an object of the notebook write "${inner}"' if inner.isidentifier() else ""
        raise DataError(f'"{name}" is neither a file here nor a name that the hub takes (owner/name){hint}')
    return _read_hub(name, split)


def _read_folder(path: Path, name: str, split: str) -> Rows:
    if not any((path / saved).is_file() for saved in SAVED_DATASET):
        return open_folder(path, name, split)
    import datasets

    rows = _read_object(datasets.load_from_disk(str(path)), split)
    return replace(rows, source=f"{path.name} ({rows.source})")


def _read_hub(name: str, split: str) -> Rows:
    import datasets

    try:
        with no_progress_bars():
            if split != "train":
                split = _find_split(split, datasets.get_dataset_split_names(name), name)
            dataset = datasets.load_dataset(name, split=split)
    except DataError:
        raise
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = f'; for an object of the notebook write "${name}"' if name.isidentifier() else "; is there a network?"
        raise DataError(f"{name} is neither a file here nor a data set that the hub gave: {reason}{hint}") from error
    return replace(_read_object(dataset, split), source=f"{name} ({split})")


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
        return replace(_read_object(source[name], split), source=f"{name} of a {kind}")
    return object_rows(source)
