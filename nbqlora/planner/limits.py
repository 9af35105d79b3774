"""What a run may take: of the card, and of the host's memory."""

from __future__ import annotations

from dataclasses import dataclass

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import GIB, MIB
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.standing import FRAGMENTATION_BYTES

# What stays free of a host's memory for Python, the data and the page cache, unless ``ram_gib`` says otherwise.
HOST_RESERVE_BYTES = 3 * GIB
# What a card's peak is above a plan's sum: small tensors, each in blocks of 512 bytes (H200, 33 runs: at most 1.3 MiB).
ROUNDING_BYTES = 2 * MIB


@dataclass(frozen=True)
class Limits:
    """Bytes that a plan may fill.

    Args:
        device_bytes: what its tensors may add up to on the card; of the process, on a CPU.
        host_bytes: pinned on the host, for inputs that are offloaded; 0 where the device is the host.
        on_card: the device is not the host.
    """

    device_bytes: int
    host_bytes: int = 0
    on_card: bool = True

    def fit(self, candidate: Candidate) -> bool:
        """Whether a way to run stays within both."""
        on_host = candidate.host_bytes if self.on_card else 0
        return candidate.budget.total_bytes <= self.device_bytes and on_host <= self.host_bytes


def limits_of(config: FinetuneConfig, device: DeviceSpec) -> Limits:
    """What a config allows on a machine."""
    usable, on_card = usable_bytes(config, device), device.kind != "cpu"
    if on_card and config.vram_gib is not None:  # elsewhere a reserve is left
        usable = max(0, usable - ROUNDING_BYTES)
    return Limits(usable, usable_host_bytes(config, device), on_card)


def usable_bytes(config: FinetuneConfig, device: DeviceSpec) -> int:
    """What the run may allocate: ``vram_gib`` of what is free, or all that is free less a reserve.

    On a CPU the process itself counts, so what it already holds is added to what is free.
    """
    there = device.free_bytes + (device.context_bytes if device.kind == "cpu" else 0)
    if config.vram_gib is not None:
        return min(int(config.vram_gib * GIB), there)
    return max(0, there - FRAGMENTATION_BYTES)


def usable_host_bytes(config: FinetuneConfig, device: DeviceSpec) -> int:
    """What inputs may take of the host's memory: ``ram_gib`` of what is free, or half of it with a reserve left."""
    if device.kind == "cpu":
        return 0
    if config.ram_gib is not None:
        return min(int(config.ram_gib * GIB), device.host_free_bytes)
    return max(0, min(device.host_free_bytes // 2, device.host_free_bytes - HOST_RESERVE_BYTES))
