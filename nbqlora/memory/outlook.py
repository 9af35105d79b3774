"""The machine as a plan would find it, without starting CUDA: what a question may cost that only asks.

Until torch has used the card the driver's library knows its name, capability and free memory. What the context will
take is not known then; it is counted as the most that was seen. The speed of the card is not known either, so a plan
made from this has no times.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import replace

from nbqlora.core.errors import DeviceError
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import MIB, format_bytes
from nbqlora.memory.device import device_spec
from nbqlora.memory.host import disk_free_bytes, read_host
from nbqlora.memory.nvml import Card, capability_of, read_card

# Contexts of 0.1 to 0.6 GiB were measured, by card, driver and libraries.
CONTEXT_BYTES = 600 * MIB


def device_outlook(output_dir: str | os.PathLike[str] = ".", *, given_back_bytes: int = 0) -> DeviceSpec:
    """The card or the CPU that a run would use; takes no memory of a card.

    Args:
        given_back_bytes: what finished runs hold there, which a run lets go of first.

    Raises:
        DeviceError: torch sees a card of which the driver's library knows nothing.
    """
    import torch

    if torch.cuda.is_initialized() or not torch.backends.cuda.is_built():
        found = device_spec(output_dir)
        if found.kind == "cpu":  # a plan counts all that this process holds as its own
            return found
        return replace(found, free_bytes=min(found.total_bytes, found.free_bytes + given_back_bytes))
    card, why = read_card()
    if card is not None:
        return _before_cuda(card, output_dir)
    if torch.cuda.is_available():
        message = f"there is a card, but how much of it is free cannot be known before CUDA is started: {why}"
        raise DeviceError(f"{message}; run torch.cuda.init() in a cell, then ask again")
    return device_spec(output_dir)


def _before_cuda(card: Card, output_dir: str | os.PathLike[str]) -> DeviceSpec:
    host, capability = read_host(), capability_of(card)
    return DeviceSpec(
        kind="cuda",
        name=card.name,
        total_bytes=card.total_bytes,
        free_bytes=max(0, card.free_bytes - CONTEXT_BYTES),
        context_bytes=CONTEXT_BYTES,
        host_free_bytes=host.free_bytes,
        disk_free_bytes=disk_free_bytes(output_dir),
        capability=capability,
        has_bf16=capability is not None and capability >= (8, 0),
        has_triton=(capability or (0, 0)) >= (7, 0) and importlib.util.find_spec("triton") is not None,
        n_devices=card.n_cards,
        notes=(*card.notes, f"CUDA is not started: its context is counted as {format_bytes(CONTEXT_BYTES)}"),
    )
