"""What a run of an engine leaves behind, and the calls to the card that are none on a CPU."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from nbqlora.core.plan import Plan

# Kernels that a profile lists.
LISTED = 24


@dataclass
class Measured:
    """Figures of a run: seconds and losses by step, the first one included; what was planned, if anything was."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    load_seconds: float = 0.0
    base_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0
    launches: int = 0
    busy_ms: float = 0.0
    plan: Plan | None = None


def device() -> torch.device:
    """The card, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card_name() -> str:
    """The card, or what the CPU is."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}"


def wait() -> None:
    """Until the card has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes on the card now."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def begin_profile() -> Any:
    """A profiler that has started."""
    from torch.profiler import ProfilerActivity, profile

    on_card = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    profiler = profile(activities=[ProfilerActivity.CPU, *on_card])
    wait()
    profiler.start()
    return profiler


def end_profile(profiler: Any, found: Measured) -> None:
    """Count the kernels, and list the longest on stderr."""
    wait()
    profiler.stop()
    kernels: dict[str, tuple[int, float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            n, ms = kernels.get(event.name, (0, 0.0))
            kernels[event.name] = (n + 1, ms + event.self_device_time_total / 1e3)
    found.launches, found.busy_ms = sum(n for n, _ in kernels.values()), sum(ms for _, ms in kernels.values())
    for name, (n, ms) in sorted(kernels.items(), key=lambda item: -item[1][1])[:LISTED]:
        print(f"{ms:9.2f} ms {n:6d}x  {name[:110]}", file=sys.stderr)
