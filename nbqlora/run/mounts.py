"""Which folders are slow, or may vanish: those that a network or a program of the user's stands behind.

Google Drive on Colab is such a program (FUSE): writing is slow there, the folder is gone when Drive is unmounted or
its daemon dies, and a full Drive shows late. Linux's table of mounts names the kind of each file system.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nbqlora.memory.room import existing

TABLE = Path("/proc/self/mounts")
# More folders that are to be treated so, separated as in PATH.
SLOW_FOLDERS = "NBQLORA_SLOW_FOLDERS"
NETWORK = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "davfs", "vboxsf", "drvfs"})
# FUSE over a disk of this machine: as fast as that, and as lasting.
LOCAL_FUSE = frozenset({"fuseblk", "fuse.fuse-overlayfs", "fuse.mergerfs", "fuse.bindfs"})


@dataclass(frozen=True, kw_only=True)
class Mount:
    """A file system and where it hangs."""

    point: Path
    kind: str

    @property
    def is_slow(self) -> bool:
        """A network or a program stands behind it."""
        fuse = self.kind == "fuse" or self.kind.startswith("fuse.")
        return self.kind in NETWORK or (fuse and self.kind not in LOCAL_FUSE)


def read_mounts(table: Path = TABLE) -> tuple[Mount, ...]:
    """All mounts, later ones last; () where the system has no such table."""
    try:
        lines = table.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return ()
    fields = [line.split(" ") for line in lines]
    return tuple(Mount(point=Path(_unescaped(f[1])), kind=f[2]) for f in fields if len(f) > 2)


def _unescaped(text: str) -> str:
    r"""The table writes a blank as ``\040``."""
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), text)


def mount_of(folder: Path, mounts: tuple[Mount, ...]) -> Mount | None:
    """The mount that holds an absolute path, or would; of two on one point the later, which hides the other."""
    holding = [m for m in mounts if folder.is_relative_to(m.point)]
    return max(enumerate(holding), key=lambda m: (len(m[1].point.parts), m[0]))[1] if holding else None


def slow_mount(folder: Path, environ: Mapping[str, str], table: Path = TABLE) -> Path | None:
    """Where the slow file system hangs that ``folder`` lies on; None for a disk of this machine.

    Args:
        folder: it need not exist yet.
        environ: the process's environment; :data:`SLOW_FOLDERS` declares folders slow.
        table: the system's list of mounts.
    """
    real = folder.expanduser().resolve()
    for declared in filter(None, environ.get(SLOW_FOLDERS, "").split(os.pathsep)):
        if real.is_relative_to(Path(declared).resolve()):
            return mount_point(real)
    mount = mount_of(real, read_mounts(table))
    # What the whole machine stands on is not slower than the rest of it.
    return mount.point if mount is not None and mount.is_slow and mount.point != Path("/") else None


def mount_point(folder: Path) -> Path:
    """The mount that a folder lies on, asked of the file system itself."""
    found = existing(folder.expanduser().resolve())
    while not os.path.ismount(found):
        found = found.parent
    return found


def in_memory(folder: Path, table: Path = TABLE) -> bool:
    """The folder lies in RAM."""
    mount = mount_of(folder.expanduser().resolve(), read_mounts(table))
    return mount is not None and mount.kind in ("tmpfs", "ramfs")
