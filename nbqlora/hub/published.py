"""What is sent of a folder: known files only, without a word of this machine.

A folder of links is filled with the files that belong to the kind, so that no checkpoint, log or note beside them can
go along. Small JSON files are looked through: libraries write down the folder that a model was loaded from, which
tells others nothing but how somebody's disk is named. Such a file is changed in the copy, and that is said.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbqlora.core.errors import PublishError
from nbqlora.core.report import Report
from nbqlora.hub.access import has_weights
from nbqlora.hub.adapter import check_adapter
from nbqlora.hub.atomic import write_json
from nbqlora.hub.card import CURVE, Kind
from nbqlora.hub.demo_model import DEMO_NAME
from nbqlora.hub.manifest import CONFIG, MANIFEST, PAGE, WEIGHTS, read_manifest, write_manifest
from nbqlora.hub.merge_journal import MANIFEST as MERGE_MANIFEST
from nbqlora.hub.reach import ask
from nbqlora.hub.save import DEMO_ORIGIN
from nbqlora.hub.sealed import sha256

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "spiece.model", "vocab.json", "vocab.txt", "merges.txt", "*.jinja", "chat_template.json", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
FILES: Mapping[Kind, tuple[str, ...]] = {
    "adapter": (CONFIG, WEIGHTS, MANIFEST, *TOKENIZER),
    "merged": (
        "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", MERGE_MANIFEST,
        "configuration_*.py", "modeling_*.py", "tokenization_*.py", *TOKENIZER,
    ),
    "gguf": ("*.gguf",),
}  # fmt: skip
# Where libraries note what a model or a tokenizer was loaded from.
BASE_KEY = "base_model_name_or_path"
ORIGINS = (BASE_KEY, "_name_or_path", "name_or_path", "tokenizer_file", "vocab_file")
SMALL_BYTES = 1 << 20
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")
# PEFT's page, which nobody filled in.
FORM = "# Model Card for Model ID"

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Base:
    """The base model as others may know it.

    Args:
        name: of the hub, or the last part of a folder's.
        is_known: it is the hub's.
    """

    name: str
    is_known: bool


def files_of(folder: Path, kind: Kind) -> list[Path]:
    """The files of this kind in a folder, or the one GGUF file that ``folder`` is.

    Raises:
        PublishError: it holds no such thing.
        ModelError: its adapter is damaged.
    """
    if kind == "gguf" and folder.is_file():
        found = [folder]
    elif folder.is_dir():
        found = sorted({f for pattern in FILES[kind] for f in folder.glob(pattern) if f.is_file()})
    else:
        raise PublishError(f"no such folder: {folder}")
    found = [f for f in found if not f.name.startswith(".")]
    if kind == "adapter":
        check_adapter(folder)
    elif kind == "merged" and not ((folder / "config.json").is_file() and has_weights(folder)):
        raise PublishError(f"{folder} holds no merged model: config.json and all its weights; merge into it first")
    elif kind == "gguf" and not (found and all(_is_gguf(f) for f in found)):
        raise PublishError(f"{folder} holds no GGUF file; export one into it first")
    return found


def _is_gguf(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def base_of(folder: Path, kind: Kind, report: Report | None, asked: str | None) -> Base:
    """What the base is called.

    Args:
        asked: what the user says it is.
    """
    if asked:
        return Base(name=asked, is_known=True)
    named = adapter_config(folder).get(BASE_KEY) if kind == "adapter" else None
    name = str(named or (report.plan.model.name if report is not None else "") or "a base model")
    if name == DEMO_NAME:
        name = DEMO_ORIGIN
    if is_local(name) or name.count("/") != 1:
        return Base(name=Path(name).name, is_known=False)
    # A folder that is not here any more can look like a name of the hub.
    known = ask(name).kind not in ("missing", "no_file", "bad_name")
    return Base(name=name if known else Path(name).name, is_known=known)


def adapter_config(folder: Path) -> dict[str, Any]:
    """An adapter's config."""
    return dict(json.loads((folder / CONFIG).read_text("utf-8")))


def is_local(name: str) -> bool:
    """The name means a file or folder of this machine."""
    return name.startswith((".", "~")) or Path(name).is_absolute() or "\\" in name or Path(name).exists()


@contextmanager
def staged(folder: Path, files: list[Path], base: Base, page: str, curve: bytes | None, say: Say) -> Iterator[Path]:
    """A folder with what is sent, for as long as the block runs.

    Args:
        page: the text for ``README.md``, unless the folder has one of its user's own.
        curve: a figure for it.

    Raises:
        PublishError: a token stands in one of the files.
    """
    with tempfile.TemporaryDirectory(prefix="nbqlora-publish-") as temporary:
        stage = Path(temporary)
        changed = [file.name for file in files if _put(file, stage, base, say)]
        own = _own_page(folder)
        if own:
            say(f"{PAGE} is your own, so it is published as it is")
        (stage / PAGE).write_text(own or page, encoding="utf-8")
        if curve is not None and not own:
            (stage / CURVE).write_bytes(curve)
        if changed:
            _list_anew(stage, base)
        _check_no_token(stage)
        yield stage


def _put(file: Path, stage: Path, base: Base, say: Say) -> bool:
    """Link a file, or write it without this machine's folders; True when it was changed."""
    value = _small_json(file)
    wrong = [key for key in ORIGINS if isinstance(value.get(key), str) and _is_wrong(key, value[key], base)]
    if not wrong:
        (stage / file.name).symlink_to(file.absolute())
        return False
    for key in wrong:
        former = value.pop(key)
        if key == BASE_KEY:
            value[key] = base.name
        how = "" if base.is_known else "; base_model names where others find it"
        say(f"{file.name} named {former}: published {f'as {base.name}{how}' if key == BASE_KEY else 'without it'}")
    write_json(value, stage / file.name)
    return True


def _is_wrong(key: str, value: str, base: Base) -> bool:
    return value != base.name if key == BASE_KEY else is_local(value)


def _small_json(file: Path) -> dict[str, Any]:
    if file.suffix != ".json" or file.name in (MANIFEST, MERGE_MANIFEST) or file.stat().st_size > SMALL_BYTES:
        return {}
    value = json.loads(file.read_text("utf-8"))
    return value if isinstance(value, dict) else {}


def _own_page(folder: Path) -> str:
    """The page that somebody wrote for this folder; "" when it is nobody's, a form or an earlier one of ours."""
    page = folder / PAGE
    if not (folder.is_dir() and page.is_file()):
        return ""
    text = page.read_text(encoding="utf-8", errors="replace")
    manifest = read_manifest(folder)
    ours = manifest is not None and manifest.page == sha256(page)
    return "" if ours or FORM in text else text


def _list_anew(stage: Path, base: Base) -> None:
    """The lists of what the folder holds: they guard what was changed."""
    (stage / MERGE_MANIFEST).unlink(missing_ok=True)
    if (stage / MANIFEST).exists():
        (stage / MANIFEST).unlink()
        write_manifest(stage, base.name)


def _check_no_token(stage: Path) -> None:
    for file in stage.iterdir():
        if file.stat().st_size <= SMALL_BYTES and TOKEN.search(file.read_text(encoding="utf-8", errors="replace")):
            raise PublishError(
                f"{file.name} holds what looks like a token of the hub; nothing was sent: remove it there"
            )
