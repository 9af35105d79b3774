"""What a run wrote on a disk of this machine, brought to the folder that the user named, and back from it.

For a folder on such a disk there is nothing to do, and nothing is done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

from nbqlora.core.errors import RunError
from nbqlora.core.events import Event, SavedEvent
from nbqlora.core.plan import SavedAdapter
from nbqlora.hub.atomic import remove_folder
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, STATE, Checkpoint, find_checkpoints
from nbqlora.hub.copied import copy_checked
from nbqlora.hub.copy_out import PATIENCE_SECONDS, CopyOut
from nbqlora.run.identity import differences
from nbqlora.run.journal import Journal
from nbqlora.run.look import Look
from nbqlora.run.mounts import mount_point
from nbqlora.run.places import DRIVE
from nbqlora.run.resume import Beginning

FLUSH_DRIVE = "before you end the session run drive.flush_and_unmount(): Drive uploads behind the scenes"

# How long a folder that was given up is waited for again.
_ONCE_MORE_SECONDS = 1.0


class Copies:
    """The copies of one run.

    Args:
        keep: checkpoints that stay there.
        writes: False for a process that leaves all files to another one.
    """

    def __init__(self, seen: Look, beginning: Beginning, keep: int, journal: Journal, *, writes: bool = True) -> None:
        self._local, self._remote, self._journal = seen.work_dir, seen.output_dir, journal
        self._out: CopyOut | None = None
        self._given_up = False
        if self._local == self._remote or not writes:
            return
        self._local.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        point = mount_point(self._remote)
        tidy = partial(_tidy, keep=keep, beginning=beginning)
        self._out = CopyOut(self._local, self._remote, is_there=partial(os.path.ismount, point), tidy=tidy)

    def back(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint that a run goes on from, on both sides.

        Returns:
            The one on this machine's disk.

        Raises:
            RunError: only the slow folder has it, and it cannot be read there.
        """
        if self._out is None:
            return checkpoint
        if checkpoint.folder.is_relative_to(self._local):
            if not _has(self._remote / CHECKPOINTS_FOLDER, checkpoint):
                self._out.take(checkpoint.folder)
            return checkpoint
        here = self._local / CHECKPOINTS_FOLDER / checkpoint.folder.name
        try:
            copy_checked(checkpoint.folder, here)
        except OSError as error:
            why = f"{checkpoint.folder} cannot be read: {error.strerror or error}"
            raise RunError(f"{why}; see that the folder is there, then resume again") from error
        copied = replace(checkpoint, folder=here)
        if damage := copied.damage():
            raise RunError(f"{checkpoint.folder} changed while it was read: {damage}; resume again")
        self._journal.note(f"copied {checkpoint.folder.name} back from {self._remote}")
        return copied

    def saved(self, events: Iterable[Event]) -> None:
        """Copy the checkpoints that these events tell of, while training goes on."""
        for event in events:
            if self._out is not None and isinstance(event, SavedEvent):
                self._out.take(Path(event.path))
        self.tell()

    def tell(self) -> None:
        """Note what was copied since, and what could not be."""
        for note in self._out.told() if self._out is not None else ():
            self._journal.note(note)

    def adapter(self, saved: SavedAdapter | None) -> tuple[SavedAdapter | None, str]:
        """Wait until all that was written is there.

        Returns:
            The adapter where the user wants it, or where it is, and then why.
        """
        if self._out is None:
            return saved, ""
        self._journal.phase("copy", f"to {self._remote}")
        if saved is not None:
            self._out.take(Path(saved.path))
        why = self.wait()
        if saved is None or why:
            return saved, why
        if self._remote.absolute().is_relative_to(DRIVE):
            self._journal.note(FLUSH_DRIVE)
        return replace(saved, path=str(self._remote / Path(saved.path).relative_to(self._local))), ""

    def file(self, path: Path) -> None:
        """Copy one more file of the run."""
        if self._out is not None:
            self._out.take(path)
            self.wait()

    def wait(self) -> str:
        """Wait for what is being copied; says what is not there and where it is instead, "" when all is well."""
        if self._out is None:
            return ""
        why = self._out.finish(_ONCE_MORE_SECONDS if self._given_up else PATIENCE_SECONDS)
        self._given_up = bool(why)
        self.tell()
        return f"not all of it is in {self._remote}: {why}; it is whole in {self._local}" if why else ""


def _has(root: Path, checkpoint: Checkpoint) -> bool:
    """The same checkpoint stands in another folder, as far as its list of files tells."""
    try:
        there, here = (folder / checkpoint.folder.name / STATE for folder in (root, checkpoint.folder.parent))
        return there.read_bytes() == here.read_bytes()
    except OSError:
        return False


def _tidy(folder: Path, *, keep: int, beginning: Beginning) -> None:
    """Of this run's checkpoints the last ``keep`` stay there and the furthest; what cannot be read is left alone.

    A slow folder may lack a file for a moment: only what surely is needless is removed.
    """
    if folder.name != CHECKPOINTS_FOLDER:
        return
    found, _ = find_checkpoints(folder)
    own = [c for c in found if not differences(c.identity, beginning.identity)]
    kept = {c.folder for c in [*own[:1], *sorted(own, key=lambda c: -c.saved_at)[:keep]]}
    for checkpoint in found:
        if checkpoint.folder not in kept:
            remove_folder(checkpoint.folder)
