"""Bytes of tensors, each storage once: views of one buffer, tied weights and quantization states are not counted twice.

Only storages are looked at, so nothing is copied, unpacked or waited for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch


def storage_bytes(tensors: Iterable[torch.Tensor | None], device_type: str, seen: set[int] | None = None) -> int:
    """Bytes of the storages behind these tensors on a kind of device.

    Args:
        device_type: ``"cuda"`` or ``"cpu"``; others are left out.
        seen: addresses of storages that were counted already; those found are added.
    """
    seen, total = set() if seen is None else seen, 0
    for tensor in tensors:
        if tensor is None or tensor.device.type != device_type:
            continue
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address and address not in seen:
            seen.add(address)
            total += storage.nbytes()
    return total


def with_quantization(parameters: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Parameters, and behind each one in 4 bits the scales that belong to it."""
    for parameter in parameters:
        yield parameter
        yield from _tensors_of(getattr(parameter, "quant_state", None))


def _tensors_of(state: Any) -> Iterator[torch.Tensor]:
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, torch.Tensor):
            yield value
        elif type(value) is type(state):
            yield from _tensors_of(value)
