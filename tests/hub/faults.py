"""Faults at every call that changes a disk: errors, a disk that is full or gone, and kills.

What writes files is run again and again, with a fault at its first call, at its second, and so on to its last:
``os.open``, ``mkdir``, ``rename``, ``replace``, ``link``, ``symlink``, ``unlink``, ``rmdir``, ``fsync``, each write of
a file that Python opened, the swap of two names, and each safetensors file. A write that fails has written half.
A kill is ``os._exit`` in a fork: nothing is cleaned up, as with SIGKILL, and nothing that was written is lost, so that
what a power cut adds is not seen here. Files that other libraries write (tokenizers' JSON) are not cut in the middle.

After each fault the folder is looked at: the former state or the new one, whole; what is left over has a hidden name;
and the next attempt succeeds.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import safetensors.torch

from nbqlora.core.errors import NbqloraError
from nbqlora.hub import atomic
from nbqlora.hub.atomic import HIDDEN, remove_leftovers

# Calls that need room on the disk; a full disk still renames and removes.
GROWING = frozenset({"create", "write", "mkdir", "link", "symlink", "safetensors"})
KILLED = 77

Fault = Literal["kill", "once", "full", "gone"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something that writes.

    Args:
        prepare: makes the former state in an empty folder.
        operate: what is disturbed.
        check: takes the folder, and gives ``old`` or ``new``; fails when it is neither, or not whole.
        begin: what a later start does first.
        always_named: the state is there under its name before ``begin`` too.
        swaps: the file system swaps two names in one step.
        errors: what may be raised.
    """

    prepare: Callable[[Path], Any]
    operate: Callable[[Path], Any]
    check: Callable[[Path], str]
    begin: Callable[[Path], Any] = remove_leftovers
    always_named: bool = True
    swaps: bool = True
    errors: tuple[type[Exception], ...] = (NbqloraError,)


class Faults:
    """Counts the calls below a folder, and lets one of them fail.

    Args:
        at: the number of the call, the first being 0; negative for none.
        fault: ``kill``; ``once``, an error of the device; ``full``, from there on no room; ``gone``, from there on
            nothing works.
        swaps: see :class:`Case`.
    """

    def __init__(self, root: Path, at: int, fault: Fault, *, swaps: bool = True) -> None:
        self.root, self.at, self.fault, self.swaps = str(root), at, fault, swaps
        self.calls: list[str] = []

    def hit(self, name: str, path: Any, half: Callable[[], Any] = lambda: None) -> None:
        """Count a call, or let it fail; ``half`` does what such a call leaves behind."""
        if isinstance(path, (str, bytes, os.PathLike)):
            path = os.fsdecode(path)
            if os.path.isabs(path) and not path.startswith(self.root):
                return
        number = len(self.calls)
        self.calls.append(name)
        if self.at < 0 or number < self.at or (number > self.at and self.fault in ("kill", "once")):
            return
        if self.fault == "full" and name not in GROWING:
            return
        if number == self.at:
            half()
        if self.fault == "kill":
            os._exit(KILLED)
        code = errno.ENOSPC if self.fault == "full" else errno.EIO
        raise OSError(code, os.strerror(code), str(path))


@contextmanager
def disturbed(faults: Faults) -> Iterator[None]:
    """Within, the calls are counted and one of them fails."""
    with (
        mock.patch.multiple(os, **{name: _counted(faults, name) for name in _OS}),
        mock.patch.object(safetensors.torch, "serialize_file", _serialize(faults)),
        mock.patch.object(atomic, "swapped", _swapped(faults)),
        _opened(faults),
    ):
        yield


_OS = ("open", "mkdir", "rename", "replace", "link", "symlink", "unlink", "remove", "rmdir", "fsync", "truncate")


def _counted(faults: Faults, name: str) -> Callable[..., Any]:
    real = getattr(os, name)

    def call(path: Any, *args: Any, **kwargs: Any) -> Any:
        # What is opened to be synced, or to be emptied by rmtree, needs no room.
        faults.hit("create" if name == "open" and args and args[0] & os.O_CREAT else name, path)
        return real(path, *args, **kwargs)

    return call


@contextmanager
def _opened(faults: Faults) -> Iterator[None]:
    """``open`` whose files tell each write."""
    real = io.open

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            whole = bytes(data)
            faults.hit("write", self.name, lambda: io.FileIO.write(self, whole[: len(whole) // 2]))
            return io.FileIO.write(self, whole) or 0

    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None, newline: Any = None,
        closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if not set(mode) & set("wax+") or isinstance(file, int):
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        faults.hit("create", file)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    with mock.patch.object(io, "open", opened), mock.patch.object(builtins, "open", opened):
        yield


def _serialize(faults: Faults) -> Callable[..., Any]:
    real = safetensors.torch.serialize_file

    def call(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
        def half() -> None:
            real(tensors, filename, *args, **kwargs)
            with io.FileIO(filename, "r+") as cut:
                cut.truncate(os.path.getsize(filename) // 2)

        try:
            faults.hit("safetensors", filename, half)
        except OSError as error:
            said = f"I/O error: {error.strerror} (os error {error.errno})"
            raise safetensors.SafetensorError(f"Error while serializing: {said}") from None
        return real(tensors, filename, *args, **kwargs)

    return call


def _swapped(faults: Faults) -> Callable[[Path, Path], bool]:
    real = atomic.swapped

    def call(one: Path, other: Path) -> bool:
        if not faults.swaps:
            return False
        faults.hit("swap", one)
        return real(one, other)

    return call


def every_fault(case: Case, folder: Path, fault: Fault) -> Counter[str]:
    """Disturb an operation at each of its calls in turn.

    Args:
        folder: empty; a copy of the former state is made in it for each attempt.

    Returns:
        How often which state was found afterwards, and ``calls``.
    """
    former, found = folder / "former", Counter[str]()
    former.mkdir(parents=True)
    case.prepare(former)
    n_calls = _undisturbed(case, former, folder / "whole")
    for at in range(n_calls):
        work = folder / f"{at}"
        shutil.copytree(former, work, symlinks=True)
        faults = Faults(work, at, fault, swaps=case.swaps)
        done = _killed(case, faults, work) if fault == "kill" else _failed(case, faults, work)
        try:
            found[_state(case, work, former, fault)] += 1
        except AssertionError as error:
            what = faults.calls[at] if len(faults.calls) > at else "?"
            raise AssertionError(f"{fault} at call {at} ({what}) of {n_calls}: {error}\n{done}") from error
        shutil.rmtree(work)
    return found + Counter(calls=n_calls)


def _undisturbed(case: Case, former: Path, work: Path) -> int:
    """Twice: what is imported or made on first use is there then."""
    for _ in range(2):
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(former, work, symlinks=True)
        faults = Faults(work, -1, "once", swaps=case.swaps)
        with disturbed(faults):
            case.operate(work)
    assert case.check(work) == "new" and not _hidden(work)
    return len(faults.calls)


def _failed(case: Case, faults: Faults, work: Path) -> str:
    """The error, which has to be one that was announced; "" where the call could be done without."""
    try:
        with disturbed(faults):
            case.operate(work)
    except case.errors as error:
        assert str(error).strip(), "an error without words"
        return str(error)
    return ""


def _killed(case: Case, faults: Faults, work: Path) -> str:
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with disturbed(faults):
                case.operate(work)
            os._exit(0)
        except BaseException:
            os.write(theirs, traceback.format_exc()[-4000:].encode())
            os._exit(1)
    os.close(theirs)
    with os.fdopen(ours, "rb") as told:
        text = told.read().decode()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (KILLED, 0), text
    return text


def _state(case: Case, work: Path, former: Path, fault: Fault) -> str:
    """What is there; then the next attempt, which succeeds and leaves nothing over."""
    left = _hidden(work)
    if case.always_named:
        named = case.check(work)
    if fault == "full":
        assert not left, f"a full disk still removes, and these were left: {left}"
    case.begin(work)
    assert not _hidden(work), f"left over: {_hidden(work)}"
    found = case.check(work)
    assert not case.always_named or found == named
    case.operate(work)
    assert case.check(work) == "new", "the next attempt does not succeed"
    assert not _hidden(work)
    return found


def _hidden(folder: Path) -> list[str]:
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.name.startswith(HIDDEN)]


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder that do not lie in hidden ones, by their path."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file())
    paths = {str(f.relative_to(folder)): f for f in files}
    return {name: f.read_bytes() for name, f in paths.items() if not name.startswith(HIDDEN)}
