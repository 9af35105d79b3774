"""What ``[trl]`` and ``[peft]`` may hold: the fields of the installed libraries, and the types that these say."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, get_type_hints

from nbqlora.core.checks import Check, of_type


def table_fields(table: str) -> Mapping[str, Check]:
    """The fields of SFTConfig (``trl``) or LoraConfig (``peft``), each with its check."""
    if table == "trl":
        from trl import SFTConfig

        return _checks(SFTConfig)
    from peft import LoraConfig

    return _checks(LoraConfig)


def _checks(config: Any) -> Mapping[str, Check]:
    try:
        hints = get_type_hints(config)
    except NameError:  # a name that the library imports for type checkers only
        hints = {}
    return {f.name: of_type(hints.get(f.name, Any)) for f in dataclasses.fields(config)}
