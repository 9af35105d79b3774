"""The doctor's checks that cost nothing, before a run: what would end it is an error now, not after a download.

Only what surely fails is an error. A library that was upgraded after it was imported, or is older than the
floor, may still work: that is a note. Whether the hub gives the model is asked where the model is looked for
(``hub.inspect.locate``), and what fits the memory is the plan's to say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, DeviceError, ModelError, OutOfDiskError, Problem
from nbqlora.core.specs import ModelSpec
from nbqlora.data.rows import DEMO
from nbqlora.hub.access import check_data_set, no_room_for
from nbqlora.memory.cards import Machine, read_machine
from nbqlora.memory.device import check_kernels
from nbqlora.memory.room import not_writable
from nbqlora.memory.versions import libraries_check, restart_check, torchao_check
from nbqlora.memory.working import NEW_BITSANDBYTES, missing_native

HUB_DATA_SET = re.compile(r"([\w-][\w.-]*/)?[\w-]+")


def preflight(config: FinetuneConfig, output_dir: Path) -> tuple[str, ...]:
    """Check machine, libraries, folder and data set; 0.05 s, and an answer of the hub if it holds the data.

    Returns:
        Notes: what may make trouble.

    Raises:
        ConfigError: ``output_dir`` cannot be written.
        DeviceError: torch or bitsandbytes has no kernels for the card.
        ModelError: torchao makes peft refuse the layers that this run adapts.
        DataError: the hub does not give the data set; said within seconds.
    """
    if reason := not_writable(output_dir):
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
