"""The doctor's checks that cost nothing, before a run: what would end it is an error now, not after a download.

Only what surely fails is an error. A library that was upgraded after it was imported, or is older than the
floor, may still work: that is a note. Whether the hub gives the model is asked where the model is looked for
(``hub.inspect.locate``), and what fits the memory is the plan's to say.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, DeviceError, ModelError, OutOfDiskError, Problem
from nbqlora.core.saving import Room
from nbqlora.core.specs import ModelSpec
from nbqlora.core.units import format_bytes
from nbqlora.data.rows import DEMO
from nbqlora.hub.access import check_data_set, no_room_for
from nbqlora.memory.cards import Machine, read_machine
from nbqlora.memory.device import check_kernels
from nbqlora.memory.host import disk_free_bytes
from nbqlora.memory.room import not_writable
from nbqlora.memory.versions import libraries_check, restart_check, torchao_check
from nbqlora.memory.working import NEW_BITSANDBYTES, missing_native
from nbqlora.planner.saving import no_room_to_run, room_elsewhere, saving_needs
from nbqlora.run.places import check_drive, rooms, work_folder

HUB_DATA_SET = re.compile(r"([\w-][\w.-]*/)?[\w-]+")


def preflight(config: FinetuneConfig, output_dir: Path) -> tuple[str, ...]:
    """Check machine, libraries, folder and data set; 0.05 s, and an answer of the hub if it holds the data.

    Returns:
        Notes: what may make trouble.

    Raises:
        ConfigError: ``output_dir`` cannot be written, or lies on a Drive that is not mounted.
        DeviceError: torch or bitsandbytes has no kernels for the card.
        ModelError: torchao makes peft refuse the layers that this run adapts.
        DataError: the hub does not give the data set; said within seconds.
    """
    check_drive(output_dir.absolute(), os.environ)
    if reason := _no_folder(output_dir):
        raise ConfigError([Problem(key="output_dir", message=reason, hint="name another folder")])
    if torch.cuda.is_available():
        check_card(
            read_machine(), torch.cuda.get_arch_list(), torch.version.cuda or "", load_in_4bit=config.load_in_4bit
        )
    torchao = torchao_check(in_full_precision=_in_full_precision(config))
    if torchao.status == "problem":
        raise ModelError(str(torchao))
    for source in (config.data, config.eval_data):
        if name := _hub_data_set(source):
            check_data_set(name)
    return tuple(str(check) for check in (libraries_check(), restart_check()) if check.status != "ok")


def _no_folder(output_dir: Path) -> str:
    try:
        return not_writable(output_dir)
    except OSError as error:  # a mount whose server or program is gone
        return f"{output_dir} cannot be reached: {error.strerror}"


@dataclass(frozen=True, kw_only=True)
class Saving:
    """Where a run writes.

    Args:
        work_dir: where files are written first; the output folder itself unless that is slow or may vanish.
        rooms: the output folder, and folders on other disks.
        notes: what to say about it.
    """

    work_dir: Path
    rooms: tuple[Room, ...] = ()
    notes: tuple[str, ...] = ()


def where_to_save(
    config: FinetuneConfig, spec: ModelSpec, output_dir: Path, environ: Mapping[str, str] = os.environ
) -> Saving:
    """Whether there is room for adapter and checkpoints, and where they are written.

    Raises:
        OutOfDiskError: there is not, with where there would be.
    """
    needs = saving_needs(config, spec, on_card=False)
    found = rooms(output_dir, Path(constants.HF_HUB_CACHE), environ)
    if reason := no_room_to_run(needs, spec, found):
        raise OutOfDiskError(reason)
    # While one checkpoint is copied, the next may be written.
    work_dir, note = work_folder(output_dir, needs.run_bytes + needs.checkpoint_bytes, environ)
    return Saving(work_dir=work_dir, rooms=found, notes=(note,) if note else ())


def check_room_for(what: str, n_bytes: int, folder: Path, environ: Mapping[str, str] = os.environ) -> None:
    """Before something large is written.

    Args:
        what: names it, for the message ("the merged model").
        folder: it need not exist yet.

    Raises:
        OutOfDiskError: its disk has no room for it; with where there is.
    """
    free = disk_free_bytes(folder)
    if free >= n_bytes:
        return
    others = rooms(folder, Path(constants.HF_HUB_CACHE), environ)[1:]
    where = room_elsewhere(n_bytes, None, others, "name a folder there")
    raise OutOfDiskError(f"{what} needs {format_bytes(n_bytes)}, and {folder} has {format_bytes(free)} free; {where}")


def check_card(machine: Machine, arch_list: list[str], built_for: str, *, load_in_4bit: bool) -> None:
    """Raise :class:`DeviceError` when torch or bitsandbytes lacks kernels for the card; CUDA is not started.

    Args:
        arch_list: what torch has kernels for.
        built_for: the CUDA that torch was built for; "" for another vendor's.
    """
    if machine.card and machine.capability:
        check_kernels(machine.card.name, machine.capability, arch_list, torch.__version__)
    if load_in_4bit and built_for and (reason := missing_native(built_for)):
        raise DeviceError(f"{reason}; {NEW_BITSANDBYTES}, or write load_in_4bit = false")


def check_download(spec: ModelSpec) -> None:
    """Raise :class:`OutOfDiskError` when the hub's cache has no room for what is still to be downloaded."""
    if reason := no_room_for(spec.download_bytes):
        raise OutOfDiskError(f"{spec.name}: {reason}")


def _in_full_precision(config: FinetuneConfig) -> bool:
    """LoRA goes on layers that are not in 4 bits."""
    asked = config.target_modules
    names = [asked] if isinstance(asked, str) else list(asked)
    return not config.load_in_4bit or any("lm_head" in name or "embed" in name for name in names)


def _hub_data_set(source: Any) -> str:
    """The hub's name of a data set, when ``source`` can be nothing else; else ""."""
    if not isinstance(source, str) or source == DEMO or not HUB_DATA_SET.fullmatch(source):
        return ""
    return "" if Path(source).exists() else source
