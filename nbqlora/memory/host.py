"""RAM and disk as this process may use them: the machine's, or what a container leaves of it.

psutil sees the machine. A container's limit (2 GB on mybinder, a pod's on Kubernetes) stands in the files of
its control group, and in those of every group above it; the tightest one counts. Page cache that a limit
counts as used is taken as free, as the kernel does for ``MemAvailable``: it is given back on demand, and
after a model was read it can be most of the figure.

Without psutil, Linux's ``/proc`` holds the same numbers.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from nbqlora.core.units import format_bytes


@dataclass(frozen=True, kw_only=True)
class ControlGroup:
    """A memory limit on this process, and how much of it is taken, page cache left out."""

    limit_bytes: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """RAM as this process may use it.

    Args:
        process_bytes: resident memory of this process.
        peak_process_bytes: its highest value since the process started; 0 where the system does not say.
        notes: "this container may use 2.0 of 31.3 GiB RAM".
    """

    total_bytes: int
    free_bytes: int
    process_bytes: int
    peak_process_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def used_bytes(self) -> int:
        """All that is not free."""
        return self.total_bytes - self.free_bytes


def read_host() -> HostMemory:
    """RAM now, limits of a container included."""
    machine_total, machine_free = _machine_ram()
    total, free = tighten(machine_total, machine_free, control_groups())
    notes: tuple[str, ...] = ()
    if total < machine_total:
        notes = (f"this container may use {format_bytes(total)} of the machine's {format_bytes(machine_total)} RAM",)
    return HostMemory(
        total_bytes=total,
        free_bytes=free,
        process_bytes=resident_bytes(),
        peak_process_bytes=peak_resident_bytes(),
        notes=notes,
    )


def tighten(total_bytes: int, free_bytes: int, groups: tuple[ControlGroup, ...]) -> tuple[int, int]:
    """Total and free RAM under the limits of ``groups``; a limit above the machine's RAM is none."""
    for group in groups:
        if group.limit_bytes < total_bytes:
            total_bytes = group.limit_bytes
        free_bytes = min(free_bytes, max(0, group.limit_bytes - group.used_bytes))
    return total_bytes, min(free_bytes, total_bytes)


def control_groups(root: Path = Path("/")) -> tuple[ControlGroup, ...]:
    """Memory limits on this process, its own group's first, then those of the groups above; () for none.

    Both versions of the interface are read. Inside a container the path in ``/proc/self/cgroup`` is often that
    of the host, which is not there; the walk upwards then ends at the mount, which is the container's group.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        inner = Path(path.lstrip("/"))
        folders = [base] if ".." in inner.parts else [base / inner, *(base / p for p in inner.parents)]
        found += [group for folder in dict.fromkeys(folders) if (group := _control_group(folder, *names))]
    return tuple(found)


def _control_group(folder: Path, limit_name: str, usage_name: str, stat_prefix: str) -> ControlGroup | None:
    try:
        limit = int((folder / limit_name).read_text())
        used = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # not there, or "max"
        return None
    cached = sum(int(stat.get(f"{stat_prefix}{which}_file", 0)) for which in ("active", "inactive"))
    return ControlGroup(limit_bytes=limit, used_bytes=max(0, used - cached))


def _machine_ram() -> tuple[int, int]:
    """Total and available RAM of the machine."""
    try:
        import psutil
    except ImportError:
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
        return total, free
    memory = psutil.virtual_memory()
    return memory.total, memory.available


def resident_bytes() -> int:
    """RAM that this process has in use now, shared libraries and mapped files included."""
    try:
        import psutil
    except ImportError:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Highest :func:`resident_bytes` since the process started; 0 where ``/proc`` does not say.

    Not ``ru_maxrss``: a child inherits its parent's through fork and exec.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def disk_free_bytes(path: str | os.PathLike[str]) -> int:
    """Free bytes of the disk that holds ``path``, or would hold it: the nearest folder that exists is asked."""
    folder = Path(path).absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def cpu_cores_text() -> str:
    """``2 CPU cores``: those that this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    return f"{count} CPU core{'s' if count != 1 else ''}"


def cpu_model() -> str:
    """The processor's name, or "" where ``/proc/cpuinfo`` does not hold one."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
