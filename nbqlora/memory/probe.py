"""What the memory looks like now, without changing it.

Asking must cost nothing: a CUDA context takes hundreds of MiB and torch takes seconds to import, so neither is
started here. Where this process already uses the card, torch's own figures are exact; before that, NVML has
them; without either, the device is the machine's RAM.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbqlora.core.report import CardNow, VramReport
from nbqlora.core.specs import MemoryCategory
from nbqlora.memory.host import HostMemory, cpu_cores_text, disk_free_bytes, read_host
from nbqlora.memory.nvml import read_card, read_cards
from nbqlora.memory.peak import highest_before_resets
from nbqlora.memory.profile import Profile, latest
from nbqlora.memory.split import Holdings, split_card, split_host

_DRIVER = Path("/dev/nvidiactl")


@dataclass(frozen=True, kw_only=True)
class _Device:
    """The part of a :class:`VramReport` that depends on where the figures come from."""

    kind: Literal["cuda", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int
    peak_bytes: int
    by_category: dict[MemoryCategory, int]
    measured_by: Literal["torch", "nvml", "os"]
    notes: tuple[str, ...]


def vram(*, holdings: Holdings | None = None, disk_path: str | os.PathLike[str] = ".") -> VramReport:
    """Memory now; imports no torch and starts no CUDA.

    Args:
        holdings: what a run holds on the device, in bytes; None for what the latest run says it does. What this
            process has beyond that appears as ``THIS_PROCESS``.
        disk_path: a folder of the disk to look at; it need not exist yet.
    """
    host = read_host()
    run = latest() if holdings is None else None
    device = _device(host, run.holdings() if run is not None else holdings)
    return VramReport(
        kind=device.kind,
        name=device.name,
        total_bytes=device.total_bytes,
        used_bytes=device.total_bytes - device.free_bytes,
        free_bytes=device.free_bytes,
        peak_bytes=device.peak_bytes,
        by_category=device.by_category,
        host_total_bytes=host.total_bytes,
        host_free_bytes=host.free_bytes,
        process_bytes=host.process_bytes,
        disk_free_bytes=disk_free_bytes(disk_path),
        disk_path=os.fspath(disk_path),
        measured_by=device.measured_by,
        reclaimable=_reclaimable(run),
        notes=device.notes + host.notes,
        cards=_cards() if device.kind == "cuda" else (),
    )


def _cards() -> tuple[CardNow, ...]:
    """All cards where there are several: one that a run leaves idle is seen, and what its workers have."""
    cards = read_cards()
    return tuple(
        CardNow(
            name=card.name,
            total_bytes=card.total_bytes,
            used_bytes=card.used_bytes,
            own_bytes=card.own_bytes,
            workers_bytes=card.workers_bytes if card.others_bytes is not None else None,
        )
        for card in (cards if len(cards) > 1 else ())
    )


def cuda_started() -> bool:
    """Torch uses a card already; nothing is imported or started by asking."""
    torch: Any = sys.modules.get("torch")
    try:
        return torch is not None and bool(torch.cuda.is_initialized())
    except AttributeError:  # another thread is importing it
        return False


def _reclaimable(run: Profile | None) -> tuple[MemoryCategory, ...]:
    """The cache, and what a run that is over still holds: the next one lets go of it."""
    held = () if run is None or run.phase else tuple(c for c, n in run.holdings().items() if n)
    return (*held, MemoryCategory.CACHE)


def _device(host: HostMemory, holdings: Holdings | None) -> _Device:
    torch: Any = sys.modules.get("torch")
    try:
        built = torch is None or torch.backends.cuda.is_built()
    except AttributeError:  # another thread is importing it
        built = True
    notes: tuple[str, ...] = ()
    if cuda_started():
        try:
            return _from_torch(torch.cuda, holdings)
        except RuntimeError as error:  # after a device-side assert every call fails, until the process ends
            first_line = str(error).partition("\n")[0]
            notes = (f"CUDA is broken in this process ({first_line}): restart the kernel",)
    return (_from_nvml(notes) if built else None) or _from_os(host, holdings, notes)


def _from_torch(cuda: Any, holdings: Holdings | None) -> _Device:
    index = cuda.current_device()
    free, total = cuda.mem_get_info(index)
    card, _ = read_card(card_uuid(cuda, index))
    by_category, notes = split_card(
        used_bytes=total - free,
        allocated_bytes=cuda.memory_allocated(index),
        reserved_bytes=cuda.memory_reserved(index),
        own_bytes=card.own_bytes if card else None,
        others_bytes=card.others_bytes if card else None,
        holdings=holdings,
    )
    return _Device(
        kind="cuda",
        name=cuda.get_device_name(index),
        total_bytes=total,
        free_bytes=free,
        peak_bytes=max(cuda.max_memory_allocated(index), highest_before_resets()),
        by_category=by_category,
        measured_by="torch",
        notes=cards_notes(cuda.device_count(), f"this is card {index}") + notes,
    )


def _from_nvml(notes: tuple[str, ...]) -> _Device | None:
    card, _ = read_card()
    if card is None:
        return None
    own = min(card.own_bytes or 0, card.used_bytes)
    others = card.used_bytes - own
    by_category = {MemoryCategory.THIS_PROCESS: own, MemoryCategory.OTHER_PROCESSES: others}
    return _Device(
        kind="cuda",
        name=card.name,
        total_bytes=card.total_bytes,
        free_bytes=card.free_bytes,
        peak_bytes=0,
        by_category=by_category,
        measured_by="nvml",
        notes=notes + card.notes + cards_notes(card.n_cards, "this is the first"),
    )


def _from_os(host: HostMemory, holdings: Holdings | None, notes: tuple[str, ...]) -> _Device:
    by_category = split_host(used_bytes=host.used_bytes, process_bytes=host.process_bytes, holdings=holdings)
    return _Device(
        kind="cpu",
        name=cpu_cores_text(),
        total_bytes=host.total_bytes,
        free_bytes=host.free_bytes,
        peak_bytes=host.peak_process_bytes,
        by_category=by_category,
        measured_by="os",
        notes=notes + hidden_card_notes(),
    )


def hidden_card_notes() -> tuple[str, ...]:
    """Why a machine with NVIDIA's driver is seen as one without a card."""
    if not _DRIVER.exists():
        return ()
    card, why = read_card()
    if card is None:
        return (f"no card to be seen: {why}",)
    torch: Any = sys.modules.get("torch")
    return (f"{card.name} is not used: torch {torch.__version__ if torch else ''} finds no CUDA",)


def card_uuid(cuda: Any, index: int) -> str:
    """NVML's name of the card that torch calls ``index``; starts CUDA if it has not been started."""
    return f"GPU-{cuda.get_device_properties(index).uuid}"


def cards_notes(n_cards: int, which: str) -> tuple[str, ...]:
    """``2 cards, this is card 0``, when there are several."""
    return (f"{n_cards} cards, {which}",) if n_cards > 1 else ()
