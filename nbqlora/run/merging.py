"""Merging an adapter into its base: what is where, how much memory there is for it, and what came of it.

For a finished run (``Run.merge``) and for any adapter's folder (``nbqlora.merge``, ``nbqlora merge``) alike; where
base and adapter come from is ``run.sources``. Nothing is loaded: the base is read from its files a few rows at a time,
so the size of the model does not matter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.merged import MergeCheck, MergeReport
from nbqlora.hub.base_weights import OriginalWeights
from nbqlora.hub.check_merged import PROMPTS, check_merged
from nbqlora.hub.inspect import read_tokenizer
from nbqlora.hub.lora_files import CONFIG, WEIGHTS
from nbqlora.hub.merge import DTYPES, MergedFiles, Progress, check_target, parse_size, work_folder, write_merged
from nbqlora.hub.merge_journal import identity_of
from nbqlora.hub.merged import MergedModel
from nbqlora.hub.refused import disk_errors
from nbqlora.hub.stored import open_model
from nbqlora.memory.allowance import check_share
from nbqlora.run.opened import BASES, Opened, opened
from nbqlora.run.preflight import check_room_for
from nbqlora.run.sources import MergeSource


@dataclass(frozen=True, kw_only=True)
class MergeSettings:
    """How to merge. Raises :class:`ConfigError` with every problem at once.

    Args:
        base: ``original``: into the published weights; ``nf4``: into what training saw of them.
        dtype: of what is written: ``auto`` (as the base stores each tensor), ``bf16``, ``fp16`` or ``fp32``.
        maximum_memory_usage: share of the free RAM and VRAM that saving may use, above 0 and at most 0.95.
        max_shard_size: of one file, ``"5GB"`` or bytes.
        temporary_location: a folder for what does not fit that memory; None for beside the result.
        check: compare the result with base and adapter on a few prompts.
    """

    base: str = "original"
    dtype: str = "auto"
    maximum_memory_usage: float = 0.9
    max_shard_size: str | int = "5GB"
    temporary_location: str | None = None
    check: bool = True

    def __post_init__(self) -> None:
        problems = []
        for key, value, known in (("base", self.base, BASES), ("dtype", self.dtype, ("auto", *DTYPES))):
            if value not in known:
                problems.append(Problem(key=key, message=f"{value!r} is none of {', '.join(known)}"))
        try:
            check_share(self.maximum_memory_usage)
        except ConfigError as error:
            problems += error.problems
        try:
            parse_size(self.max_shard_size)
        except ValueError as error:
            problems.append(Problem(key="max_shard_size", message=str(error)))
        if problems:
            raise ConfigError(problems, "the merge")


def merge(
    source: MergeSource, target: Path, settings: MergeSettings, say: Callable[[str], Progress] | None = None
) -> MergeReport:
    """Write the merged model.

    Args:
        target: a folder that is not there yet, or holds an earlier merge.
        say: given a stage's name, gives what is called with its bytes done and in all.

    Raises:
        ModelError: base or adapter cannot be merged; nothing was written.
        RunError: ``target`` holds something else.
        OutOfDiskError, DiskError: the disk is too small, or refuses; finished shards stay for the next attempt.
    """
    begun = time.monotonic()
    shown, target = str(target), target.expanduser().absolute()
    check_target(target)
    spill = Path(settings.temporary_location).expanduser() if settings.temporary_location else work_folder(target)
    keep = settings.temporary_location is None
    with opened(source, settings.base, settings.maximum_memory_usage, spill, keep_folder=keep) as files:
        done = _write(source, target, settings, files, say("merge") if say else lambda done, total: None)
        return MergeReport(
            path=shown,
            base=settings.base,
            dtype=settings.dtype,
            n_bytes=done.n_bytes,
            n_files=len(done.files),
            n_changed=files.model.n_changed,
            kept_bytes=done.kept_bytes,
            spilled_bytes=files.workspace.spilled_bytes,
            device=str(files.device),
            check=_check(target, source, files) if settings.check else None,
            seconds=time.monotonic() - begun,
        )


def _write(source: MergeSource, target: Path, settings: MergeSettings, files: Opened, say: Progress) -> MergedFiles:
    told = disk_errors(f"{target} cannot be written", "what is whole of it stays: run it again when that is mended")
    # NF4 made again is bound by arithmetic: 16 GB took 212 s on one core, the writing of it 30.
    with told, _a_core_for_the_disk() if settings.base == "original" else nullcontext():
        return write_merged(
            target,
            files.model,
            _identity(source, settings, files),
            dtype=settings.dtype,
            max_shard_bytes=parse_size(settings.max_shard_size),
            check_room=check_room_for,
            say=say,
        )


@contextmanager
def _a_core_for_the_disk() -> Iterator[None]:
    """Torch takes one thread less: its threads wait for each other, and the writer would hold up one of them.

    1B in bf16 on 2 cores: 217 and 479 MB/s with both, 507 and 660 with one, in turns.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before - 1))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _identity(source: MergeSource, settings: MergeSettings, files: Opened) -> dict[str, Any]:
    """Settings that decide what is written; how much memory it takes does not."""
    names = dict.fromkeys(each.file for each in files.stored.values())
    adapters = [folder / name for folder in source.adapters for name in (CONFIG, WEIGHTS)]
    how = {"arithmetic": source.dtype} if settings.base == "nf4" else {}
    return identity_of(
        files.model, names, adapters, base_is=settings.base, dtype=settings.dtype,
        max_shard_bytes=parse_size(settings.max_shard_size), **how,
    )  # fmt: skip


def _check(target: Path, source: MergeSource, files: Opened) -> MergeCheck:
    tokenizer = read_tokenizer(str(files.model.tokenizer_folder), trust_remote_code=source.trust_remote_code)
    at_once = files.allowance.piece_bytes
    alone = MergedModel(source.folder, files.base, [], piece_bytes=at_once)
    written = OriginalWeights(open_model(target), torch.device("cpu"))
    merged = MergedModel(target, written, [], piece_bytes=at_once)
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    return check_merged(merged, alone, files.model, files.adapters, ids, trust_remote_code=source.trust_remote_code)
