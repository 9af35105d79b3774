"""Copies beside a run: it never waits for them, the newest wins, and a folder that fails is tried again."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Event, current_thread, main_thread
from typing import Any

import pytest

from nbqlora.hub.atomic import remove_folder
from nbqlora.hub.copied import copy_file
from nbqlora.hub.copy_out import CopyOut
from tests.hub.test_copied import content, fill
from tests.mounts import mount, mounted, unmount


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "far", "4m") as folder:
        yield folder


def step(local: Path, number: int, n: int = 1000) -> Path:
    return fill(local / f"checkpoints/step-{number:06d}", b"%d " % number, n)


def out(local: Path, far: Path, **changes: Any) -> CopyOut:
    return CopyOut(local, far / "run1", is_there=partial(os.path.ismount, far), **changes)


class Gate:
    """Copies that wait until they are let through."""

    def __init__(self) -> None:
        self.open, self.reached = Event(), Event()
        self.threads: set[Any] = set()

    def __call__(self, source: Path, target: Path, moved: Callable[[int], None]) -> str:
        self.threads.add(current_thread())
        self.reached.set()
        assert self.open.wait(30)
        return copy_file(source, target, moved)


def hidden(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.name.startswith(".")]


def test_everything_is_there_at_the_end_and_told_once(local: Path, far: Path) -> None:
    copies = out(local, far)
    copies.take(step(local, 1))
    fill(local / "adapter", b"adapter ")
    copies.take(local / "adapter")
    (local / "run.json").write_text("{}")
    copies.take(local / "run.json")
    assert copies.finish() == ""
    assert content(far / "run1") == content(local)
    notes = copies.told()
    assert [n.split(" (")[0] for n in notes] == [
        f"copied {name} to {far}/run1" for name in ("checkpoints/step-000001", "adapter", "run.json")
    ]
    assert notes[0].endswith("s, read back)")
    assert copies.told() == [] and hidden(local) == hidden(far) == []


def test_a_run_does_not_wait_and_of_what_waits_the_newest_is_copied(local: Path, far: Path) -> None:
    gate = Gate()
    copies = out(local, far, copy=gate)
    begun = time.monotonic()
    for number in range(1, 6):
        copies.take(step(local, number))
        assert gate.reached.wait(10), "the first one is being copied"
    assert time.monotonic() - begun < 5
    for number in range(1, 6):
        remove_folder(local / f"checkpoints/step-{number:06d}")  # pruned, or written again, in the meantime
    gate.open.set()
    assert copies.finish() == ""
    assert sorted(p.name for p in (far / "run1/checkpoints").iterdir()) == ["step-000001", "step-000005"]
    assert content(far / "run1/checkpoints/step-000005") == content(step(local, 5))
    assert main_thread() not in gate.threads and len(gate.threads) == 1
    assert hidden(local) == []


def test_what_changes_while_it_waits_is_copied_as_it_was(local: Path, far: Path) -> None:
    gate = Gate()
    copies = out(local, far, copy=gate)
    (local / "adapter").mkdir(parents=True)
    (local / "adapter/adapter_model.safetensors").write_text("old")
    copies.take(local / "adapter")
    (local / "new").write_text("new")
    os.replace(local / "new", local / "adapter/adapter_model.safetensors")
    gate.open.set()
    assert copies.finish() == ""
    assert (far / "run1/adapter/adapter_model.safetensors").read_text() == "old"


def test_a_mount_that_goes_costs_a_note_and_what_waits_is_copied_when_it_is_back(local: Path, far: Path) -> None:
    copies = out(local, far)
    copies.take(step(local, 1))
    assert copies.finish() == ""
    copies.told()
    unmount(far)
    for number in (2, 3):
        copies.take(step(local, number))
        assert copies.finish() == "it is no longer mounted"
    (note,) = copies.told()
    assert note == (
        f"not copied to {far}/run1: it is no longer mounted; checkpoints/step-000002 stays in {local} "
        "and is tried again at the next save"
    )
    assert list(far.iterdir()) == []
    mount(far)
    assert copies.finish() == ""
    assert sorted(p.name for p in (far / "run1/checkpoints").iterdir()) == ["step-000003"]
    assert hidden(local) == []


def test_a_full_disk_takes_what_still_fits(local: Path, far: Path) -> None:
    copies = out(local, far)
    copies.take(step(local, 1, n=900_000))
    copies.take(fill(local / "adapter", b"adapter "))
    assert copies.finish() == "No space left on device"
    assert sorted(p.name for p in (far / "run1").iterdir()) == ["adapter", "checkpoints"]
    assert list((far / "run1/checkpoints").iterdir()) == []
    assert (local / "checkpoints/step-000001").exists() and len(copies.told()) == 2


def test_a_silent_cut_is_found_and_the_next_try_succeeds(local: Path, far: Path) -> None:
    cuts = iter([True, False, False, False, False, False])

    def copy(source: Path, target: Path, moved: Callable[[int], None]) -> str:
        digest = copy_file(source, target, moved)
        if next(cuts, False):
            os.truncate(target, 10)
        return digest

    copies = out(local, far, copy=copy)
    copies.take(step(local, 1))
    assert copies.finish() == ""
    first, second = copies.told()
    assert "it holds 10 of" in first and second.startswith("copied checkpoints/step-000001")
    assert content(far / "run1") == content(local)


def test_a_folder_that_hangs_is_given_up_at_the_end(local: Path, far: Path) -> None:
    gate = Gate()
    copies = out(local, far, copy=gate)
    copies.take(step(local, 1))
    assert copies.finish(patience_seconds=0.2) == "nothing could be written there for 0.2 s"
    gate.open.set()
    assert copies.finish() == "" and content(far / "run1") == content(local)


def test_a_slow_folder_that_moves_is_waited_for(local: Path, far: Path) -> None:
    def slowly(source: Path, target: Path, moved: Callable[[int], None]) -> str:
        time.sleep(0.3)
        return copy_file(source, target, moved)

    copies = out(local, far, copy=slowly)
    copies.take(step(local, 1))
    assert copies.finish(patience_seconds=1.2) == ""


def test_what_killed_copies_left_there_is_removed(local: Path, far: Path) -> None:
    (far / "run1/checkpoints/.saving-step-000001-1234").mkdir(parents=True)
    copies = out(local, far)
    copies.take(step(local, 2))
    assert copies.finish() == "" and hidden(far) == []


def test_old_ones_are_tidied_behind_a_copy_and_trouble_there_is_a_note(local: Path, far: Path) -> None:
    def tidy(folder: Path) -> None:
        shutil.rmtree(folder / "step-000001")
        raise OSError(errno.EIO, "Input/output error")

    (far / "run1/checkpoints/step-000001").mkdir(parents=True)
    copies = out(local, far, tidy=tidy)
    copies.take(step(local, 2))
    assert copies.finish() == ""
    assert copies.told()[1] == f"old files stay in {far}/run1/checkpoints: Input/output error"
    assert [p.name for p in (far / "run1/checkpoints").iterdir()] == ["step-000002"]


def test_a_fault_of_the_program_is_raised_where_the_run_is(local: Path, far: Path) -> None:
    def broken(source: Path, target: Path, moved: Callable[[int], None]) -> str:
        raise LookupError("mine")

    copies = out(local, far, copy=broken)
    copies.take(step(local, 1))
    with pytest.raises(LookupError, match="mine"):
        copies.finish()


def test_without_links_the_files_themselves_are_copied(local: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    copies = out(local, far)
    copies.take(step(local, 1))
    assert copies.finish() == ""
    assert content(far / "run1") == content(local) and hidden(local) == []
