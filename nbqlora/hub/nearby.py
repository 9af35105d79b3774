"""A model's config where it lies on this machine already; nothing is fetched, and nothing large imported."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbqlora.core.errors import ModelError
from nbqlora.hub.access import cached_copy, local_folder
from nbqlora.hub.demo_model import DEMO_NAME, demo_model, is_cached


def nearby_config(name: str) -> Mapping[str, Any] | None:
    """What ``config.json`` says, of a model whose files are all here; None of any other.

    Args:
        name: a folder, a name on the hub or ``demo``.
    """
    try:
        folder = _folder(name)
        found = None if folder is None else json.loads((Path(folder) / "config.json").read_text("utf-8"))
    except (ModelError, OSError, ValueError):  # the run says what is wrong with it
        return None
    return found if isinstance(found, dict) else None


def _folder(name: str) -> str | Path | None:
    if name == DEMO_NAME:
        return demo_model() if is_cached() else None
    return local_folder(name) or cached_copy(name)
