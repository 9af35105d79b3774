"""A model that is computed without being loaded: on the meta device, each module given its weights when it is called.

The most that is held is what one module has. What PEFT wrapped gets its weights as a whole, since PEFT reads them from
other modules than the one that is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nbqlora.core.errors import ModelError

Tensor = torch.Tensor
# A parameter's values by its path; of an embedding only the rows that are asked for.
Weights = Callable[[str, Sequence[int] | None], Tensor]


def fill_buffers(model: Any) -> None:
    """Buffers that no file holds (rotary frequencies, scales), as transformers fills them after a load.

    Args:
        model: on the meta device; its buffers are on the CPU afterwards.

    Raises:
        ModelError: transformers does not say what a buffer holds.
    """
    for path, module in model.named_modules():
        own = dict(module.named_buffers(recurse=False))
        for name, buffer in own.items():
            unset = float("nan") if buffer.is_floating_point() else 0
            module._buffers[name] = torch.full_like(buffer, unset, device="cpu")
        if own:
            model._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.isnan().any():
                raise ModelError(
                    f"the merge is written, but cannot be checked: what is in {path}.{name}? Use check=False"
                )


@contextmanager
def streamed(decoder: Any, prefix: str, embedding: str, weights: Weights, vocabulary: Sequence[int]) -> Iterator[None]:
    """Within, each module has its weights while it is called.

    Args:
        decoder: on the meta device.
        prefix: its path in the model, with which ``weights`` is asked.
        embedding: path of the embedding, which gets the rows of ``vocabulary`` only.
        weights: a parameter's values by its path; None for all rows.
    """
    handles = []
    for inner, unit in _units(decoder):
        path = f"{prefix}.{inner}".strip(".")
        rows = vocabulary if path == embedding else None
        handles.append(unit.register_forward_pre_hook(_Give(path, weights, rows)))
        handles.append(unit.register_forward_hook(_take))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _units(model: Any) -> Iterator[tuple[str, Any]]:
    """Modules that get their weights together: what PEFT wrapped as a whole, otherwise each with weights of its own."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    wrapped: list[str] = []
    for path, module in model.named_modules():
        if any(path.startswith(f"{w}.") for w in wrapped):
            continue
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            wrapped.append(path)
            yield path, module
        elif any(True for _ in module.parameters(recurse=False)):
            yield path, module


class _Give:
    """Puts the weights on a module, read anew."""

    def __init__(self, path: str, weights: Weights, rows: Sequence[int] | None) -> None:
        self._path, self._weights, self._rows = path, weights, rows

    def __call__(self, unit: Any, arguments: Any) -> None:
        for name, _ in list(unit.named_parameters()):
            _set(unit, name, self._weights(f"{self._path}.{name}", self._rows))


def _take(unit: Any, arguments: Any, output: Any) -> None:
    for name, parameter in list(unit.named_parameters()):
        _set(unit, name, torch.empty_like(parameter, device="meta"))


def _set(unit: Any, name: str, value: Tensor) -> None:
    *inner, last = name.split(".")
    owner = unit.get_submodule(".".join(inner))
    parameter = torch.nn.Parameter(value, requires_grad=False)
    if isinstance(owner, torch.nn.ParameterDict):
        owner[last] = parameter
    else:
        owner._parameters[last] = parameter
