"""A model on its device, ready to train or to talk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from nbqlora.core.plan import Replacement
from nbqlora.core.specs import ModelSpec


@dataclass(kw_only=True)
class LoadedModel:
    """The model with its adapter, and what was done to it.

    Args:
        model: a ``PeftModel``, PEFT's own parameter names.
        tokenizer: transformers' tokenizer.
        spec: the model's shape.
        device: where it is.
        dtype: arithmetic of forward and backward.
        replacements: what was changed on it, and what was looked at and left.
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    replacements: tuple[Replacement, ...] = ()

    def __repr__(self) -> str:
        return f"LoadedModel({self.spec.name} on {self.device}, {str(self.dtype).removeprefix('torch.')})"


def autocast(loaded: LoadedModel) -> Any:
    """The context that training and generation run in: mixed precision below fp32, nothing in fp32."""
    enabled = loaded.dtype != torch.float32
    return torch.autocast(loaded.device.type, dtype=loaded.dtype, enabled=enabled)
