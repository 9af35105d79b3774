"""The names that ``[trl]`` and ``[peft]`` may hold: those of the installed libraries."""

from __future__ import annotations

import dataclasses


def table_fields(table: str) -> frozenset[str]:
    """Names of SFTConfig's (``trl``) or LoraConfig's (``peft``) fields."""
    if table == "trl":
        from trl import SFTConfig

        return frozenset(f.name for f in dataclasses.fields(SFTConfig))
    from peft import LoraConfig

    return frozenset(f.name for f in dataclasses.fields(LoraConfig))
