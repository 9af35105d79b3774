"""Who holds the memory in use: figures in, a partition out that sums to the bytes in use, whatever is unknown.

torch knows what it allocated (and what of it is only cached), a live run knows which part of that is weights,
adapter and so on, NVML knows the whole process where it can see processes. What none of them explains is
the CUDA context and other programs.
"""

from __future__ import annotations

from collections.abc import Mapping

from nbqlora.core.specs import MemoryCategory

Holdings = Mapping[MemoryCategory, int]


def split_host(*, used_bytes: int, process_bytes: int, holdings: Holdings | None = None) -> dict[MemoryCategory, int]:
    """RAM in use by holder. Mapped files count in a process but not as used, so it is cut to what is used."""
    process = min(process_bytes, used_bytes)
    return _split_process(process, holdings) | {MemoryCategory.OTHER_PROCESSES: used_bytes - process}


def split_card(
    *,
    used_bytes: int,
    allocated_bytes: int,
    reserved_bytes: int,
    own_bytes: int | None,
    others_bytes: int | None,
    holdings: Holdings | None = None,
) -> tuple[dict[MemoryCategory, int], tuple[str, ...]]:
    """A card's bytes in use by holder, and what a reader should know about them.

    Args:
        allocated_bytes: what torch handed out.
        reserved_bytes: that, and what torch keeps to hand out again.
        own_bytes: this process by NVML; None when it is not listed.
        others_bytes: the other processes by NVML; None when unknown.
        holdings: what a live run says it holds of the allocated bytes.
    """
    reserved = min(reserved_bytes, used_bytes)
    allocated = min(allocated_bytes, reserved)
    rest = used_bytes - reserved
    notes: tuple[str, ...] = ()
    if own_bytes is not None and own_bytes >= reserved:
        context = min(rest, own_bytes - reserved)
    elif others_bytes is not None and others_bytes <= rest:
        context = rest - others_bytes
    else:  # a container: no process is listed, or this one is, under a number that is not its own
        context = rest
        notes = ("NVML shows no processes here: context includes what other programs hold",)
    return _split_process(allocated, holdings) | {
        MemoryCategory.CONTEXT: context,
        MemoryCategory.CACHE: reserved - allocated,
        MemoryCategory.OTHER_PROCESSES: rest - context,
    }, notes


def _split_process(n_bytes: int, holdings: Holdings | None) -> dict[MemoryCategory, int]:
    """The bytes of this process: as ``holdings`` says, first come first served, and the rest without a name."""
    parts: dict[MemoryCategory, int] = {}
    for category, held in (holdings or {}).items():
        parts[category] = min(held, n_bytes)
        n_bytes -= parts[category]
    return parts | {MemoryCategory.THIS_PROCESS: n_bytes}
