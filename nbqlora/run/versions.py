"""Which releases took part in a run, and which of them changed between two parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from nbqlora.core.version import __version__

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def versions() -> dict[str, str]:
    """Of nbqlora and the libraries that train."""
    return {"nbqlora": __version__, **{name: metadata.version(name) for name in LIBRARIES}}


def changed_versions(then: Mapping[str, str]) -> list[str]:
    """A line that names what changed since ``then``; none when nothing did."""
    changed = [f"{name} {then.get(name, 'none')} -> {now}" for name, now in versions().items() if then.get(name) != now]
    return [f"other versions: {', '.join(changed)}; the last digits may differ"] if changed else []
