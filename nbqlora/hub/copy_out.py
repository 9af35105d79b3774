"""From a disk of this machine to a slow or vanishing folder, beside the training, which does not wait for it.

What a run writes is whole on this machine first. One thread copies it, one thing at a time; of checkpoints that are
still waiting only the newest is kept. A folder that is full, cut short or gone costs a note, never the run: what
could not be copied waits for the next save, and for the end. Snapshots (hard links: no bytes) keep what waits from
being pruned under the copier's hands.

The thread tells nothing itself: notes are collected for :meth:`CopyOut.told`, asked by whoever may show them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Lock, Thread
from time import monotonic, sleep

from nbqlora.core.units import format_bytes, format_seconds
from nbqlora.hub.atomic import hidden_beside, remove_leftovers, replace_folder
from nbqlora.hub.copied import CopyFile, NameFolder, copy_checked, copy_file, remove_hidden
from nbqlora.hub.save import ADAPTER_FOLDER, keep_others

# Without a byte moved for so long, the folder is given up at the end of a run.
PATIENCE_SECONDS = 120.0
_LOOK_SECONDS = 0.05

# A path below both folders, and where its files are read from.
Item = tuple[Path, Path]


class CopyOut:
    """Copies files and folders of ``local`` to the same place in ``remote``.

    Args:
        local: where the run writes.
        remote: where it shall be.
        is_there: the file system of ``remote`` is mounted.
        tidy: called with a folder of ``remote`` when something new stands in it.
        copy, name_folder: see :func:`nbqlora.hub.copied.copy_checked`.
    """

    def __init__(
        self,
        local: Path,
        remote: Path,
        *,
        is_there: Callable[[], bool],
        tidy: Callable[[Path], None] = lambda folder: None,
        copy: CopyFile = copy_file,
        name_folder: NameFolder = replace_folder,
    ) -> None:
        self._local, self._remote = local, remote
        self._is_there, self._tidy, self._copy, self._name_folder = is_there, tidy, copy, name_folder
        self._lock = Lock()
        self._waiting: dict[str, Item] = {}
        self._notes: list[str] = []
        self._failed: dict[str, str] = {}
        self._fault: Exception | None = None
        self._moved = 0
        self._working = False

    def take(self, path: Path) -> None:
        """Copy this file or folder of ``local`` when its turn comes; it may change or go from now on."""
        name = path.relative_to(self._local)
        snapshot = _snapshot(path, self._local)
        with self._lock:
            former = self._waiting.pop(name.parts[0], None)
            self._waiting[name.parts[0]] = (name, snapshot)
        if former is not None:
            _drop(former[1], self._local / former[0])
        self._start()

    def told(self) -> list[str]:
        """What happened since this was last asked. Raises what broke the copier, if it is no fault of the folder."""
        self._raise_fault()
        with self._lock:
            notes, self._notes = self._notes, []
        return notes

    def finish(self, patience_seconds: float = PATIENCE_SECONDS) -> str:
        """Wait for what is being copied, and try once more what could not be.

        Args:
            patience_seconds: how long nothing may move.

        Returns:
            Why something is not in ``remote``; "" when all is.
        """
        if self._waited(patience_seconds):
            self._start()
            if self._waited(patience_seconds):
                self._raise_fault()
                with self._lock:
                    return "; ".join(dict.fromkeys(self._failed[kind] for kind in self._waiting))
        return f"nothing could be written there for {format_seconds(patience_seconds)}"

    def _raise_fault(self) -> None:
        fault, self._fault = self._fault, None
        if fault is not None:
            raise fault

    def _waited(self, patience_seconds: float) -> bool:
        """Wait for the thread; False when nothing moves."""
        moved, since = self._moved, monotonic()
        while self._working:
            sleep(_LOOK_SECONDS)
            if self._moved != moved:
                moved, since = self._moved, monotonic()
            elif monotonic() - since > patience_seconds:
                return False
        return True

    def _start(self) -> None:
        with self._lock:
            if self._working or not self._waiting:
                return
            self._working = True
        Thread(target=self._work, name="nbqlora copies", daemon=True).start()

    def _work(self) -> None:
        """Try everything that waits, once."""
        tried: set[Path] = set()
        while item := self._next(tried):
            tried.add(item[1])
            try:
                self._copied(*item)
            except OSError as error:
                self._put_back(item, _reason(error))
            except Exception as error:  # raised again by told(), in the thread that owns the run
                self._fault = error

    def _next(self, tried: set[Path]) -> Item | None:
        with self._lock:
            kind = next((k for k, (_, snapshot) in self._waiting.items() if snapshot not in tried), None)
            # Said under the lock, so that whoever adds something later knows that it must start anew.
            self._working = kind is not None
            return None if kind is None else self._waiting.pop(kind)

    def _copied(self, name: Path, snapshot: Path) -> None:
        begun = monotonic()
        n_bytes = copy_checked(
            snapshot,
            self._remote / name,
            is_there=self._is_there,
            moved=self._count,
            copy=self._copy,
            name_folder=self._name_folder,
            **({"keep": keep_others} if name.parts[0] == ADAPTER_FOLDER else {}),
        )
        _drop(snapshot, self._local / name)
        took = format_seconds(monotonic() - begun)
        self._note(f"copied {name} to {self._remote} ({format_bytes(n_bytes)} in {took}, read back)")
        self._failed.pop(name.parts[0], None)
        self._tidied(name)

    def _count(self, n_bytes: int) -> None:
        self._moved += n_bytes

    def _tidied(self, name: Path) -> None:
        folder = (self._remote / name).parent
        try:
            remove_leftovers(folder)
            self._tidy(folder)
        except OSError as error:
            self._note(f"old files stay in {folder}: {_reason(error)}")

    def _put_back(self, item: Item, reason: str) -> None:
        """It waits for the next save, unless there is a newer one of its kind."""
        name, snapshot = item
        kind = name.parts[0]
        with self._lock:
            newer, known = kind in self._waiting, self._failed.get(kind) == reason
            self._failed[kind] = reason
            if not newer:
                self._waiting[kind] = item
        if newer:
            _drop(snapshot, self._local / name)
        if not known:
            kept = f"{name} stays in {self._local} and is tried again at the next save"
            self._note(f"not copied to {self._remote}: {reason}; {kept}")

    def _note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)


def _snapshot(path: Path, beside: Path) -> Path:
    """The same files under a hidden name, without a copy of their bytes; ``path`` itself where links cannot be made."""
    hidden = hidden_beside(beside / path.name)
    try:
        if path.is_file():
            os.link(path, hidden)
            return hidden
        for file in path.rglob("*"):
            if file.is_file():
                to = hidden / file.relative_to(path)
                to.parent.mkdir(parents=True, exist_ok=True)
                os.link(file, to)
    except OSError:
        _drop(hidden, path)
        return path
    return hidden


def _drop(snapshot: Path, original: Path) -> None:
    if snapshot != original:
        with suppress(OSError):
            remove_hidden(snapshot)


def _reason(error: OSError) -> str:
    """A few words."""
    return (error.strerror or str(error)).partition("\n")[0]
