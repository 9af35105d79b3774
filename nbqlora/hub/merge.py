"""A merged model on disk: written shard by shard, resumable, and under its name only when it is whole.

The shards are made in a folder beside, ``.merging-<name>``. Each is written under a hidden name, synced and renamed,
then its size and digest are noted in a journal; so a run that was killed, or met a full disk, goes on after its last
whole shard, if base, adapter and settings are still the same (by digest). The finished folder takes its name by one
rename. The journal stays in it, as the record of what it was made from and what every file should be.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import RunError
from nbqlora.core.units import MIB, format_bytes
from nbqlora.hub.atomic import replace_folder, sync, write_json
from nbqlora.hub.merge_journal import MANIFEST, begin, is_finished, note
from nbqlora.hub.merged import MergedModel
from nbqlora.hub.sealed import sha256
from nbqlora.hub.shards import Entry, Written, index_of, plan_shards, write_shard
from nbqlora.hub.stored import INDEX

ROOM_BYTES = 64 * MIB
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What belongs to a tokenizer or a processor, whichever library wrote it.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json",
)  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)

Progress = Callable[[int, int], None]
CheckRoom = Callable[[str, int, Path], None]


@dataclass(frozen=True, kw_only=True)
class MergedFiles:
    """What was written.

    Args:
        files: names of the shards.
        n_bytes: of all tensors.
        kept_bytes: of those in shards that an earlier attempt had finished; all of them when the same merge was there.
    """

    folder: Path
    files: tuple[str, ...]
    n_bytes: int
    kept_bytes: int


def parse_size(text: str | int) -> int:
    """``"5GB"`` (10**9), ``"500MiB"`` (2**20) or a number of bytes. Raises ``ValueError``."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if match is None or float(match[1]) == 0:
        raise ValueError(f'{text!r} is no size; write a number of bytes, "5GB" or "500MiB"')
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def work_folder(target: Path) -> Path:
    """Where a merge is made before it has its name."""
    return target.parent / f".merging-{target.name}"


def check_target(target: Path) -> None:
    """Raise :class:`RunError` unless ``target`` is free, or holds an earlier merge."""
    if not target.exists():
        return
    if not target.is_dir():
        raise RunError(f"{target} is a file; name a folder for the merged model")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise RunError(f"{target} holds other files; a merge replaces only an earlier merge: name another folder")


def entries_of(model: MergedModel, dtype: str) -> list[Entry]:
    """All tensors with the dtype they are written in; whole numbers stay as they are.

    Args:
        dtype: ``auto`` (as the base stores each), ``bf16``, ``fp16`` or ``fp32``.
    """

    def written(name: str) -> torch.dtype:
        stored = model.dtype(name)
        return stored if dtype == "auto" or not stored.is_floating_point else DTYPES[dtype]

    return [Entry(name=name, dtype=written(name), shape=model.shape(name)) for name in model.names]


def write_merged(
    target: Path,
    model: MergedModel,
    identity: Mapping[str, Any],
    *,
    dtype: str,
    max_shard_bytes: int,
    check_room: CheckRoom,
    say: Progress,
) -> MergedFiles:
    """Write the merged model, or what an earlier attempt left to do of it.

    Args:
        target: its folder; an earlier merge there is replaced when the new one is whole.
        identity: see :func:`identity_of`.
        dtype: see :func:`entries_of`.
        check_room: raises when a folder's disk has no room; given what for, how many bytes, and the folder.
        say: called with bytes done and bytes in all.

    Raises:
        RunError: ``target`` holds something else.
        OutOfDiskError: the disk is too small; whole shards stay for the next attempt.
        ModelError: a value does not fit the dtype, or a file cannot be read any more.
    """
    check_target(target)
    shards = plan_shards(entries_of(model, dtype), max_shard_bytes)
    total = _n_bytes(shards)
    if is_finished(target, identity):
        # Left by a merge that was killed right after it had replaced another one.
        shutil.rmtree(work_folder(target), ignore_errors=True)
        return MergedFiles(folder=target, files=tuple(shards), n_bytes=total, kept_bytes=total)
    work = work_folder(target)
    written = begin(work, identity)
    kept = _n_bytes({file: shards[file] for file in written})
    done_already = f" (its whole shards, {format_bytes(kept)}, stay)" if kept else ""
    check_room(f"{'the rest of ' if kept else ''}{target.name}{done_already}", total - kept + ROOM_BYTES, work)
    _write_rest(work, model, shards, written, identity, say)
    _finish(work, model, dtype, shards, written, identity)
    replace_folder(work, target)
    return MergedFiles(folder=target, files=tuple(shards), n_bytes=total, kept_bytes=kept)


def _n_bytes(shards: Mapping[str, Sequence[Entry]]) -> int:
    return sum(entry.n_bytes for entries in shards.values() for entry in entries)


def _write_rest(
    work: Path,
    model: MergedModel,
    shards: Mapping[str, tuple[Entry, ...]],
    written: dict[str, Written],
    identity: Mapping[str, Any],
    say: Progress,
) -> None:
    """The shards that are not whole yet, each added to ``written`` and noted in the journal."""
    total, done = _n_bytes(shards), _n_bytes({file: shards[file] for file in written})

    def add(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        say(min(done, total), total)

    for file, entries in shards.items():
        if file not in written:
            written[file] = write_shard(work / file, entries, model.pieces_as, add)
            note(work, identity, written)


def _finish(
    work: Path,
    model: MergedModel,
    dtype: str,
    shards: Mapping[str, tuple[Entry, ...]],
    written: Mapping[str, Written],
    identity: Mapping[str, Any],
) -> None:
    """The files beside the shards, and the manifest of them all."""
    for file in [f for f in work.iterdir() if f.is_file() and f.name not in (*shards, MANIFEST)]:
        file.unlink()
    write_json(_config(model, dtype), work / "config.json")
    if len(shards) > 1:
        write_json(index_of(shards), work / INDEX)
    for source in _files_beside(model):
        shutil.copyfile(source, work / source.name)
    beside = [f for f in sorted(work.iterdir()) if f.is_file() and f.name not in (*shards, MANIFEST)]
    for file in beside:
        sync(file)
    files = {**written, **{f.name: Written(file=f.name, n_bytes=f.stat().st_size, sha256=sha256(f)) for f in beside}}
    note(work, identity, written, files={name: [w.n_bytes, w.sha256] for name, w in files.items()})
    sync(work)


def _files_beside(model: MergedModel) -> Iterator[Path]:
    tokenizer = [model.tokenizer_folder / name for name in TOKENIZER_FILES]
    yield from (f for f in tokenizer if f.is_file())
    if (model.folder / "generation_config.json").is_file():
        yield model.folder / "generation_config.json"
    if "auto_map" in model.config:  # the model brings its own code, which its config points to
        yield from sorted(model.folder.glob("*.py"))


def _config(model: MergedModel, dtype: str) -> dict[str, Any]:
    """The base's config, less what no longer holds of it."""
    config = {key: value for key, value in model.config.items() if key != "quantization_config"}
    parts = [config]
    if isinstance(config.get("text_config"), dict):
        config["text_config"] = dict(config["text_config"])
        parts.append(config["text_config"])
    for part in parts:
        if dtype != "auto":
            names = [key for key in ("dtype", "torch_dtype") if key in part] or (["dtype"] if part is config else [])
            part.update(dict.fromkeys(names, str(DTYPES[dtype]).removeprefix("torch.")))
        if model.unties and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    return config
