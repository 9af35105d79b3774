"""The card as the driver's management library sees it: memory and processes, without starting CUDA.

CUDA and NVML number cards differently: ``CUDA_VISIBLE_DEVICES`` hides and reorders for CUDA only, and CUDA's
default order is by speed while NVML's is by PCI bus. So a card is named by its UUID here. Until CUDA runs,
its first card is worked out from the environment; afterwards torch says the UUID.

NVML stays initialised once asked: it counts its users, holds no memory of the card, and a second start
would cost as much as the first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

# What the command line of a run's worker holds.
WORKER_MODULE = "nbqlora.run.workers.worker"


@dataclass(frozen=True, kw_only=True)
class Card:
    """One card.

    Args:
        total_bytes: what programs can use: the driver's own reserve is left out, as CUDA does.
        n_cards: cards that CUDA would see.
        own_bytes: memory of this process; None when NVML does not list it.
        others_bytes: memory of all other processes listed; None when it lists none, or not their memory.
        workers_bytes: of these, memory of processes that train for a run; 0 where none is known to.
        notes: what makes the choice of the card uncertain.
    """

    uuid: str
    name: str
    total_bytes: int
    free_bytes: int
    n_cards: int
    own_bytes: int | None
    others_bytes: int | None
    workers_bytes: int = 0
    notes: tuple[str, ...] = ()

    @property
    def used_bytes(self) -> int:
        """All that is not free."""
        return self.total_bytes - self.free_bytes


def read_card(uuid: str = "") -> tuple[Card | None, str]:
    """The card with ``uuid``, by default the first that CUDA would use; or None, and why."""
    try:
        import pynvml
    except ImportError:
        return None, "nvidia-ml-py is not installed"
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(h) for h in handles]
        visible = visible_uuids(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        if not visible and not uuid:
            return None, "CUDA_VISIBLE_DEVICES hides every card" if uuids else "NVML knows no card"
        chosen = uuid or visible[0]
        names = {pynvml.nvmlDeviceGetName(h) for h in handles}
        notes = () if uuid else order_notes(len(visible), names, os.environ.get("CUDA_DEVICE_ORDER"))
        return _read(pynvml, chosen, n_cards=len(visible), notes=notes), ""
    except pynvml.NVMLError as error:
        return None, f"NVML: {error}"


def read_cards() -> tuple[Card, ...]:
    """Every card that CUDA would use, in its order; () where none can be seen."""
    try:
        import pynvml
    except ImportError:
        return ()
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [pynvml.nvmlDeviceGetUUID(h) for h in handles]
        visible = visible_uuids(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
        return tuple(_read(pynvml, uuid, n_cards=len(visible), notes=()) for uuid in visible)
    except pynvml.NVMLError:  # read_card() says why
        return ()


def _read(nvml: ModuleType, uuid: str, *, n_cards: int, notes: tuple[str, ...]) -> Card:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    total, free = _memory(nvml, handle)
    bytes_of = _processes(nvml, handle)
    own, others = split_processes(bytes_of, os.getpid())
    return Card(
        uuid=uuid,
        name=nvml.nvmlDeviceGetName(handle),
        total_bytes=total,
        free_bytes=free,
        n_cards=n_cards,
        own_bytes=own,
        others_bytes=others,
        workers_bytes=sum(n or 0 for pid, n in bytes_of.items() if pid != os.getpid() and is_worker(pid)),
        notes=notes,
    )


def is_worker(pid: int) -> bool:
    """A process that a run was started with, of this notebook or another one."""
    import psutil

    try:
        return WORKER_MODULE in psutil.Process(pid).cmdline()
    except psutil.Error:  # gone, or somebody else's, or a number of another container
        return False


def capability_of(card: Card) -> tuple[int, int] | None:
    """The card's compute capability; None where the driver's library does not tell it."""
    import pynvml

    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(pynvml.nvmlDeviceGetHandleByUUID(card.uuid))
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


def _memory(nvml: ModuleType, handle: Any) -> tuple[int, int]:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return memory.total - memory.reserved, memory.free
    except (AttributeError, TypeError, nvml.NVMLError):  # older library or driver: the reserve counts as used
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        return memory.total, memory.free


def _processes(nvml: ModuleType, handle: Any) -> dict[int, int | None]:
    """Bytes by process id; a process may be listed for compute and for graphics, with the same figure."""
    found: dict[int, int | None] = {}
    for ask in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            found |= {p.pid: p.usedGpuMemory for p in ask(handle)}
        except nvml.NVMLError:  # not supported, or not permitted on a shared card
            continue
    return found


def split_processes(bytes_of: Mapping[int, int | None], pid: int) -> tuple[int | None, int | None]:
    """This process's bytes and the others', each None when it cannot be known."""
    others = [n for p, n in bytes_of.items() if p != pid]
    known = [n for n in others if n is not None]
    return bytes_of.get(pid), sum(known) if bytes_of and len(known) == len(others) else None


def visible_uuids(variable: str | None, uuids: Sequence[str]) -> tuple[str, ...]:
    """Cards that CUDA sees, in its order, by the rules of ``CUDA_VISIBLE_DEVICES``.

    Args:
        variable: its value; None when unset.
        uuids: all cards, in NVML's order.

    Indices and (shortened) UUIDs may be given; the first that names no card ends the list, and a card named
    twice hides all. Ids of MIG slices are taken as they are.
    """
    if variable is None:
        return tuple(uuids)
    chosen: list[str] = []
    for entry in (e.strip() for e in variable.split(",")):
        if entry.isdecimal() and int(entry) < len(uuids):
            uuid = uuids[int(entry)]
        elif entry.startswith("MIG-"):
            uuid = entry
        else:
            matches = [u for u in uuids if entry.startswith("GPU-") and u.startswith(entry)]
            if len(matches) != 1:
                break
            uuid = matches[0]
        if uuid in chosen:
            return ()
        chosen.append(uuid)
    return tuple(chosen)


def order_notes(n_cards: int, names: set[str], cuda_device_order: str | None) -> tuple[str, ...]:
    """Says so when CUDA may count cards of several models in another order than NVML."""
    if n_cards < 2 or len(names) < 2 or cuda_device_order == "PCI_BUS_ID":
        return ()
    return ("cards of several models: CUDA may start on another one; CUDA_DEVICE_ORDER=PCI_BUS_ID settles the order",)
