"""JSON that tells when it was changed, and files that are known by their size and digest.

A digest of its own content stands in the JSON, so that a flipped digit in it is found as one in a tensor is. This
guards against disks, copies and mix-ups, not against a person who wants to deceive: whoever can write the file can
write the digest too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SEAL = "sha256"

FileFacts = Mapping[str, tuple[int, str]]


class OtherFormatError(ValueError):
    """A file of another release."""


def sealed(value: Mapping[str, Any], *, form: int) -> dict[str, Any]:
    """The same values, with the number of their format and their digest.

    Raises:
        ValueError: a number is none that JSON knows.
    """
    value = {"format": form, **value}
    return {**value, SEAL: _digest(value)}


def read_sealed(file: Path, *, form: int) -> dict[str, Any]:
    """The values of a sealed file.

    Raises:
        OSError: it cannot be read.
        OtherFormatError: it says that it has another format.
        ValueError: it is not JSON, or not as it was written.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError(f"{file.name} is nested too deep") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file.name} holds no object")
    if value.get("format") != form:
        raise OtherFormatError(f"it was written in format {value.get('format')}, and this release reads {form}")
    seal = value.pop(SEAL, None)
    if seal != _digest(value):
        raise ValueError(f"{file.name} is not what was written")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    # What is read back gives the same text: Python writes each float so that the same one is read, and keeps the order.
    return hashlib.sha256(json.dumps(value, allow_nan=False).encode()).hexdigest()


def sha256(file: Path) -> str:
    """A file's digest, read in pieces."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def file_facts(files: Iterable[Path]) -> dict[str, tuple[int, str]]:
    """Size in bytes and digest of each file, by its name."""
    return {f.name: (f.stat().st_size, sha256(f)) for f in files}


def read_facts(value: Any) -> dict[str, tuple[int, str]]:
    """Facts from JSON. Raises ``ValueError`` when they are none, or name a file outside their folder."""
    if not isinstance(value, dict):
        raise ValueError("no files are listed")
    facts = {}
    for name, entry in value.items():
        if Path(name).name != name or not isinstance(entry, list) or len(entry) != 2:
            raise ValueError(f"what is listed for {name!r} makes no sense")
        facts[name] = (int(entry[0]), str(entry[1]))
    return facts


def first_damage(folder: Path, facts: FileFacts) -> str:
    """What is wrong with the files of a folder, compared with the facts; ``""`` when nothing is."""
    for name, (size, digest) in facts.items():
        file = folder / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} of {size} bytes"
            if sha256(file) != digest:
                return f"{name} is not what was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror or error}"
    return ""
