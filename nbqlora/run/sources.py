"""What there is to merge or export: the base's files, the adapter, and the arithmetic that it was trained in.

A finished run knows all three. An adapter's folder knows its base by name, and if it lies in a run's folder, that
run's ``run.json`` knows the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ModelError, RunError
from nbqlora.core.plan import Plan
from nbqlora.hub.access import cached_copy
from nbqlora.hub.demo_model import DEMO_NAME, demo_model
from nbqlora.hub.inspect import locate
from nbqlora.hub.lora_files import CONFIG
from nbqlora.hub.save import ADAPTER_FOLDER, DEMO_ORIGIN
from nbqlora.hub.stored import INDEX, SINGLE

RUN_FILE = "run.json"
# What transformers itself needs of a model.
FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "*.py")


@dataclass(frozen=True, kw_only=True)
class MergeSource:
    """What is merged.

    Args:
        folder: the base's files.
        adapters: folders in PEFT's format, merged in this order.
        dtype: the arithmetic that the adapter was trained in, for the NF4 base.
        in_4bit: it was trained on a base in NF4.
        model: the model, if it is loaded: its 4-bit weights are taken as they are.
    """

    folder: Path
    adapters: tuple[Path, ...]
    dtype: str
    in_4bit: bool = True
    model: Any = None
    trust_remote_code: bool = False


def source_of_run(config: FinetuneConfig, plan: Plan, adapter: Path, model: Any) -> MergeSource:
    """What a finished run merges.

    Args:
        adapter: the folder that it saved.
        model: the loaded model, or None.

    Raises:
        ModelError: the base's files are gone and the hub does not give them.
    """
    return MergeSource(
        folder=folder_of(config.model),
        adapters=(adapter,),
        dtype=plan.dtype,
        in_4bit=plan.load_in_4bit,
        model=model if plan.load_in_4bit else None,
        trust_remote_code=config.trust_remote_code,
    )


def source_of_folders(
    folders: Sequence[Path], model: str | None = None, *, trust_remote_code: bool = False
) -> MergeSource:
    """What adapters' or runs' folders merge.

    Args:
        folders: a run's folder, or an adapter's in PEFT's format; several are merged in this order.
        model: the base; None for the one that the adapter names.

    Raises:
        RunError: none of the folders holds an adapter.
        ModelError: the base cannot be found.
    """
    adapters = tuple(_adapter(folder) for folder in folders)
    if not adapters:
        raise RunError("no adapter was named; give a run's folder, or an adapter's")
    told = _run_file(adapters[0])
    plan, config = told.get("plan", {}), told.get("config", {})
    return MergeSource(
        folder=folder_of(model or config.get("model") or _base_of(adapters[0])),
        adapters=adapters,
        dtype=str(plan.get("dtype", "bf16")),
        in_4bit=bool(plan.get("load_in_4bit", True)),
        trust_remote_code=trust_remote_code,
    )


def folder_of(name: str) -> Path:
    """The folder with a model's files: the demo's, ``name`` itself, its copy in the hub's cache, or a new one there.

    Raises:
        ModelError: there is no such model, or the hub does not give it.
    """
    if name in (DEMO_NAME, DEMO_ORIGIN) and (name == DEMO_NAME or cached_copy(name) is None):
        return demo_model()
    place = locate(name)
    if Path(place).is_dir():
        return Path(place)
    copy = cached_copy(place)
    return copy if copy is not None else _downloaded(place)


def _downloaded(name: str) -> Path:
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=list(FILES)))
    if not any((folder / file).is_file() for file in (SINGLE, INDEX)):
        raise ModelError(f"{name} has no safetensors on the hub; weights in other formats are not read")
    return folder


def _adapter(folder: Path) -> Path:
    for found in (folder / ADAPTER_FOLDER, folder):
        if (found / CONFIG).is_file():
            return found
    if not folder.is_dir():
        raise RunError(f"no such folder: {folder}")
    inner = sorted(f.parent.name for f in folder.glob(f"*/{CONFIG}"))
    hint = f"; {', '.join(inner)} in it do: give one of them, or several" if inner else ""
    raise RunError(f"{folder} holds no adapter (no {CONFIG}), nor a run's folder {ADAPTER_FOLDER}{hint}")


def _run_file(adapter: Path) -> dict[str, Any]:
    """What the run that saved this adapter wrote down; {} for an adapter from elsewhere."""
    file = adapter.parent / RUN_FILE
    if adapter.name != ADAPTER_FOLDER or not file.is_file():
        return {}
    try:
        told = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is not JSON") from error
    return told if isinstance(told, dict) else {}


def _base_of(adapter: Path) -> str:
    try:
        name = json.loads((adapter / CONFIG).read_text("utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise ModelError(f"{adapter / CONFIG} is not JSON") from error
    if not name:
        raise ModelError(f"{adapter / CONFIG} does not say which base it is for; name the model")
    return str(name)
