"""Where a run's files go, whether they will still be there tomorrow, and where else there is room."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.saving import Room
from nbqlora.hub.access import is_colab, is_kaggle
from nbqlora.memory.host import disk_free_bytes
from nbqlora.memory.room import existing, not_writable
from nbqlora.run.mounts import TABLE, in_memory, slow_mount

DRIVE = Path("/content/drive")
KAGGLE_KEPT = Path("/kaggle/working")
MOUNT_DRIVE = 'run: from google.colab import drive; drive.mount("/content/drive")'


def default_output_dir(name: str) -> str:
    """``runs/<name>``, relative to where the notebook or shell stands."""
    return str(Path("runs") / name)


def ephemeral_note(output_dir: Path, environ: Mapping[str, str]) -> str:
    """What to say before training about a folder that disappears with its session; ``""`` for one that stays.

    Args:
        output_dir: an absolute path.
        environ: the process's environment; Colab and Kaggle are told by the variables they set.
    """
    if is_colab(environ):
        if output_dir.is_relative_to(DRIVE):
            return ""
        kept = DRIVE / "MyDrive" / output_dir.name
        return f'{output_dir} disappears with this session; mount Drive and write output_dir = "{kept}" to keep it'
    if environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive":
        return f"{output_dir} disappears with this session; Save Version > Save & Run All keeps it"
    if is_kaggle(environ) and not output_dir.is_relative_to(KAGGLE_KEPT):
        return f"{output_dir} disappears with this session; only /kaggle/working is kept"
    if is_binder(environ):
        return f"{output_dir} disappears with this session; download the folder adapter when the run is done"
    return ""


def is_binder(environ: Mapping[str, str]) -> bool:
    """This is a session of BinderHub."""
    return "BINDER_SERVICE_HOST" in environ or "BINDER_LAUNCH_HOST" in environ


def check_drive(output_dir: Path, environ: Mapping[str, str], drive: Path = DRIVE) -> None:
    """Raise :class:`ConfigError` where :func:`drive_problem` finds one."""
    problem = drive_problem(output_dir, environ, drive)
    if problem is not None:
        raise ConfigError([problem])


def drive_problem(output_dir: Path, environ: Mapping[str, str], drive: Path = DRIVE) -> Problem | None:
    """What is wrong where Drive is meant and not mounted: its folder would be one of this machine's.

    Args:
        output_dir: an absolute path.
        drive: where Drive is mounted.
    """
    if not is_colab(environ) or not output_dir.is_relative_to(drive) or os.path.ismount(drive):
        return None
    message = f"Drive is not mounted, so {output_dir} would disappear with this session"
    return Problem(key="output_dir", message=message, hint=MOUNT_DRIVE)


def stays(folder: Path, environ: Mapping[str, str]) -> bool | None:
    """Whether an absolute path outlives the session; None where nobody knows."""
    if is_colab(environ):
        return folder.is_relative_to(DRIVE)
    if is_kaggle(environ):
        return folder.is_relative_to(KAGGLE_KEPT)
    return False if is_binder(environ) else None


def rooms(output_dir: Path, cache: Path, environ: Mapping[str, str] = os.environ) -> tuple[Room, ...]:
    """The output folder, then other folders of this machine on other disks that may be written.

    Args:
        cache: the hub's, to know which disk a download takes from.
    """
    cache_disk = _disk(cache)
    found: dict[int, Room] = {}
    for folder in (output_dir.absolute(), *_candidates(environ)):
        disk = _disk(folder)
        if not found or (disk not in found and folder.is_dir() and not not_writable(folder)):
            path, free = str(output_dir if not found else folder), disk_free_bytes(folder)
            kept = stays(folder, environ)
            found[disk] = Room(path=path, free_bytes=free, stays=kept, holds_cache=disk == cache_disk)
    return tuple(found.values())


def _candidates(environ: Mapping[str, str]) -> tuple[Path, ...]:
    if is_colab(environ):
        drive = (DRIVE / "MyDrive",) if os.path.ismount(DRIVE) else ()
        return (*drive, Path("/content"))
    if is_kaggle(environ):
        return (KAGGLE_KEPT, Path("/kaggle/temp"), Path("/tmp"))
    return (Path.cwd(), Path.home(), Path(tempfile.gettempdir()))


def _disk(folder: Path) -> int:
    return existing(folder).stat().st_dev


def work_folder(
    output_dir: Path,
    needed_bytes: int,
    environ: Mapping[str, str] = os.environ,
    table: Path = TABLE,
    roots: Sequence[Path] | None = None,
) -> tuple[Path, str]:
    """Where a run writes that shall lie in ``output_dir``, and what to say about it; nothing is made.

    A slow or vanishing folder is written by copies of a folder on a disk of this machine, which has the same name at
    the next run, so that this one finds what the last one left.

    Args:
        needed_bytes: what that folder must have room for.
        table: the system's list of mounts.
        roots: where it may lie; None for the usual places.

    Returns:
        ``output_dir`` itself, unless it is slow.
    """
    if slow_mount(output_dir, environ, table) is None:
        return output_dir, ""
    own = f"{output_dir.name}-{hashlib.sha256(os.fsencode(output_dir.resolve())).hexdigest()[:12]}"
    for root in _roots() if roots is None else roots:
        slow, held = slow_mount(root, environ, table), in_memory(root, table)
        if slow is None and not held and not not_writable(root) and disk_free_bytes(root) >= needed_bytes:
            return root / own, f"{output_dir} is no disk of this machine: written to {root / own}, then copied there"
    return output_dir, f"{output_dir} is no disk of this machine, and none has room for the files until they are copied"


def _roots() -> tuple[Path, ...]:
    """Folders of this user's own: a name that can be guessed, in a folder of everybody's, must not be another's."""
    user = f"nbqlora-{os.getuid()}" if hasattr(os, "getuid") else "nbqlora"
    temporary = [Path(tempfile.gettempdir()), Path("/var/tmp")]
    return (
        *(root / user for root in temporary if _is_own(root / user)),
        Path.home() / ".cache" / "nbqlora" / "outputs",
    )


def _is_own(folder: Path) -> bool:
    try:
        return not folder.is_symlink() and folder.stat().st_uid == os.getuid()
    except FileNotFoundError:
        return True
