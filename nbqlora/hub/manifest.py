"""``nbqlora.json``: what an adapter's folder held when it was written, so that damage is found before it is used.

PEFT passes the file over. A folder without it, made by PEFT itself, is an adapter as any other: then only its parts
are looked at. The page (``README.md``) is not guarded: it is for its reader to change.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

from nbqlora.core.errors import ModelError
from nbqlora.core.version import __version__
from nbqlora.hub.atomic import write_json
from nbqlora.hub.sealed import (
    FileFacts,
    OtherFormatError,
    file_facts,
    first_damage,
    read_facts,
    read_sealed,
    sealed,
    sha256,
)
from nbqlora.hub.stored import read_header

MANIFEST = "nbqlora.json"
CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PAGE = "README.md"
FORMAT = 1
LIBRARIES = ("torch", "transformers", "peft", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What was written.

    Args:
        base_model: what ``adapter_config.json`` named as the base.
        versions: of the libraries that wrote it.
        files: size and digest of each file, but for the page.
        page: digest of the page.
    """

    base_model: str
    versions: Mapping[str, str]
    files: FileFacts
    page: str


def write_manifest(folder: Path, base_model: str) -> None:
    """List the files that are in ``folder`` now."""
    files = sorted(f for f in folder.iterdir() if f.is_file() and f.name not in (MANIFEST, PAGE))
    page = sha256(folder / PAGE) if (folder / PAGE).is_file() else ""
    value = {"base_model": base_model, "versions": _versions(), "files": file_facts(files), "page": page}
    write_json(sealed(value, form=FORMAT), folder / MANIFEST)


@cache
def _versions() -> dict[str, str]:
    return {"nbqlora": __version__, **{name: metadata.version(name) for name in LIBRARIES}}


def read_manifest(folder: Path) -> Manifest | None:
    """What is listed; None without a list, or with one that a later release wrote.

    Raises:
        ValueError: the list itself is damaged.
    """
    try:
        value = read_sealed(folder / MANIFEST, form=FORMAT)
    except (FileNotFoundError, OtherFormatError):
        return None
    except OSError as error:
        raise ValueError(f"{MANIFEST} cannot be read: {error.strerror or error}") from error
    files, page = read_facts(value.get("files")), str(value.get("page"))
    return Manifest(base_model=str(value.get("base_model")), versions=value.get("versions", {}), files=files, page=page)


def adapter_damage(folder: Path, *, all_files: bool = False) -> str:
    """What is wrong with an adapter's folder; ``""`` when nothing is. No file but JSON and safetensors is opened.

    Args:
        all_files: look at everything that is listed, the tokenizer's files too, not only at what PEFT reads.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            pickled = name == WEIGHTS and (folder / PICKLE).is_file()
            return f"{name} is missing" + (f", and {PICKLE} is a pickle, which is never opened" if pickled else "")
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return str(error) if str(error).startswith(MANIFEST) else f"{MANIFEST} cannot be read"
    if manifest is not None:
        unlisted = [name for name in (CONFIG, WEIGHTS) if name not in manifest.files]
        listed = {k: v for k, v in manifest.files.items() if all_files or k in (CONFIG, WEIGHTS)}
        return f"{MANIFEST} does not list {unlisted[0]}" if unlisted else first_damage(folder, listed)
    return _look(folder)


def _look(folder: Path) -> str:
    """Without a list: whether the parts can be read."""
    try:
        if not isinstance(json.loads((folder / CONFIG).read_text(encoding="utf-8")), dict):
            return f"{CONFIG} is no adapter's config"
    except (ValueError, RecursionError):
        return f"{CONFIG} is not JSON"
    except OSError as error:
        return f"{CONFIG} cannot be read: {error.strerror or error}"
    try:
        read_header(folder / WEIGHTS)
    except ModelError as error:
        return str(error).removeprefix(f"{folder}/")
    return ""
