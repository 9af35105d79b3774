"""What came of a merge or an export: values without tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbqlora.core.display import Displayed
from nbqlora.core.plain import plain
from nbqlora.core.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class MergeCheck:
    """Logits of the merged files beside those of base and adapter, on a few prompts, both in fp32.

    Args:
        n_tokens: positions compared.
        n_same: of them, how many have the same likeliest next token.
        largest_difference: of any logit.
        spread: standard deviation of the logits, which a difference is to be measured by.
    """

    n_tokens: int
    n_same: int
    largest_difference: float
    spread: float

    @property
    def relative(self) -> float:
        """The largest difference in units of the logits' spread."""
        return self.largest_difference / self.spread if self.spread else self.largest_difference

    @property
    def agrees(self) -> bool:
        """The two models are the same but for rounding."""
        return self.relative <= AGREES and self.n_same >= 0.9 * self.n_tokens


# Rounding to bf16 moved logits by 0.025 of their spread for the demo model and a 1B shape, by 0.035 for an 8B shape.
# The adapter left out of one layer of the demo's 30 moved them by 0.10, out of one q_proj by 0.08; one down_proj was
# lost in the rounding, so a small fault in a large model can be missed. Written in fp32 it stays below 0.001.
AGREES = 0.08


@dataclass(frozen=True, kw_only=True, repr=False)
class MergeReport(Displayed):
    """A merged model on disk.

    Args:
        path: its folder, which plain transformers loads.
        base: ``original`` (the published weights) or ``nf4`` (what training saw of them).
        dtype: of what was written; ``auto`` for each tensor's own.
        n_bytes: of all tensors.
        n_changed: tensors that the adapter changed.
        kept_bytes: of shards that an earlier, interrupted merge had finished.
        spilled_bytes: that lay in ``temporary_location`` because they did not fit the memory that was allowed.
        device: where the arithmetic ran.
        check: None when it was not asked for.
    """

    path: str
    base: str
    dtype: str
    n_bytes: int
    n_files: int
    n_changed: int
    kept_bytes: int
    spilled_bytes: int
    device: str
    seconds: float
    check: MergeCheck | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        return f"MergeReport({self.path}: {format_bytes(self.n_bytes)}, base {self.base}, {self.dtype})"


@dataclass(frozen=True, kw_only=True, repr=False)
class ExportedGguf(Displayed):
    """A GGUF file on disk.

    Args:
        architecture: llama.cpp's name for the family.
        tensor_types: how many tensors are stored in which type.
        notes: what llama.cpp does otherwise than transformers with this model, one line each.
    """

    path: str
    n_bytes: int
    sha256: str
    quantization: str
    architecture: str
    n_tensors: int
    tensor_types: Mapping[str, int]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(plain(self))

    def __repr__(self) -> str:
        return f"ExportedGguf({self.path}: {format_bytes(self.n_bytes)}, {self.quantization})"
