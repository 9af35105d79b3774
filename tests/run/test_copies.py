"""Whole runs into a folder that is slow or vanishes: same steps, whole copies, resumed from whichever side has more."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import nbqlora
from nbqlora.core.errors import OutOfDiskError
from nbqlora.core.events import SavedEvent, StepEvent
from nbqlora.run.mounts import SLOW_FOLDERS
from tests.hub.test_copied import content
from tests.mounts import mounted, show_at, unmount
from tests.run.resuming import (
    EVERY_STEP,
    TOTAL,
    InterruptAfter,
    finetune,
    notes,
    plan,
    same,
    saved_steps,
    until,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick")


class Far:
    """A folder that is declared slow: ``root`` shows a file system that can go and come back."""

    def __init__(self, tmp_path: Path) -> None:
        self.root, self._disk, self.temporary = tmp_path / "far", tmp_path / "disk", tmp_path / "tmp"
        self.out = self.root / "run1"

    @property
    def local(self) -> Path:
        """Where the run's files are written first."""
        (found,) = self.temporary.glob("nbqlora-*/run1-*")
        return found

    def come(self) -> None:
        show_at(self.root, self._disk)

    def go(self) -> None:
        unmount(self.root)

    def lose_session(self) -> None:
        """This machine's disk is another one."""
        shutil.rmtree(self.local)


@pytest.fixture
def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    made = Far(tmp_path)
    made.temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(made.temporary))
    monkeypatch.setenv(SLOW_FOLDERS, str(made.root))
    with mounted(made._disk, "200m"):
        made.come()
        try:
            yield made
        finally:
            made.go()


class AtStep:
    """Does something when a step is told."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == self.step:
            self.do()


def fail() -> None:
    raise LookupError("mine")


def test_a_run_is_written_here_and_copied_there(model, whole, far):
    run = finetune(model, far.out, save_minutes=1e-9)
    assert same(run, whole) and run.report.reason == ""
    assert run.adapter_dir == far.out / "adapter"
    assert content(far.out / "adapter") == content(far.local / "adapter")
    assert (far.out / "run.json").read_bytes() == (far.local / "run.json").read_bytes()
    there = saved_steps(far.out)
    assert TOTAL in there and len(there) <= 2, "the last 2 at most"
    last = f"checkpoints/step-{TOTAL:06d}"
    assert content(far.out / last) == content(far.local / last)
    saved = [Path(e.path) for e in run.events if isinstance(e, SavedEvent)]
    assert all(path.is_relative_to(far.local) for path in saved)
    told = notes(run)
    assert f"copied adapter to {far.out}" in {n.split(" (")[0] for n in told}
    assert run.plan.notes[0] == f"{far.out} is no disk of this machine: written to {far.local}, then copied there"
    assert [*far.root.rglob(".*"), *far.local.rglob(".*")] == []


def test_files_of_the_users_own_beside_the_adapter_stay_there(model, far):
    (far.out / "adapter").mkdir(parents=True)
    (far.out / "adapter/notes.txt").write_text("mine")
    for _ in range(2):
        finetune(model, far.out, max_steps=1)
        assert (far.out / "adapter/notes.txt").read_text() == "mine"
        assert weights(far.out / "adapter") == weights(far.local / "adapter")


def test_the_limit_holds_there_too(model, far):
    finetune(model, far.out, save_minutes=1e-9, trl={"save_total_limit": 1})
    assert saved_steps(far.out) == [TOTAL] == saved_steps(far.local)


def test_checkpoints_of_another_run_go_there_too(model, far, killed):
    shutil.copytree(killed(4), far.out)
    finetune(model, far.out, seed=7, max_steps=2)
    assert saved_steps(far.out) == [2]


def test_a_lost_session_goes_on_from_the_copies(model, whole, far):
    stopped = finetune(model, far.out, observe=InterruptAfter(4), **EVERY_STEP)
    step = stopped.report.steps[-1].step
    assert step < TOTAL
    far.lose_session()
    found = plan(model, far.out).notes
    assert any(n.startswith(f"{far.out} holds {step} of 9 steps of this same run") for n in found)
    run = stopped.resume()
    assert same(run, whole) and run.adapter_dir == far.out / "adapter"
    assert f"copied step-{step:06d} back from {far.out}" in notes(run)
    assert step in saved_steps(far.local)


def test_a_run_that_fails_leaves_its_last_checkpoint_there(model, whole, far):
    with pytest.raises(LookupError):
        finetune(model, far.out, save_minutes=1e-9, observe=AtStep(5, fail))
    far.lose_session()
    assert 4 in saved_steps(far.out)
    assert same(finetune(model, far.out, resume=True), whole)


def test_a_damaged_copy_is_passed_over_for_the_one_before(model, whole, far, killed):
    shutil.copytree(killed(5), far.out)
    (far.out / "checkpoints/step-000005/optimizer.safetensors").write_bytes(b"")
    run = finetune(model, far.out, resume=True)
    assert any(n.startswith("passed over step-000005: optimizer.safetensors has 0 of") for n in run.plan.notes)
    assert f"copied step-000004 back from {far.out}" in notes(run) and same(run, whole)


@pytest.mark.parametrize(("here", "there"), [(3, 6), (6, 3), (6, 6)])
def test_the_furthest_of_both_sides_wins(model, whole, far, here, there):
    finetune(model, far.out, max_steps=1)
    local = far.local
    for folder, step in ((local, here), (far.out, there)):
        shutil.rmtree(folder)
        until(step, whole.adapter_dir.parent, folder)
    run = finetune(model, far.out, resume=True)
    assert any(n.startswith("goes on after step 6 of 9") for n in run.plan.notes) and same(run, whole)
    assert any("back from" in n for n in notes(run)) is (there > here)
    assert TOTAL in saved_steps(far.out)


def test_a_finished_run_whose_last_checkpoint_was_not_copied_copies_it(model, far):
    finetune(model, far.out, max_steps=1)
    shutil.rmtree(far.out / "checkpoints")
    assert finetune(model, far.out, max_steps=1, resume=True).report.reason == ""
    assert saved_steps(far.out) == [1]


def test_a_folder_that_vanishes_costs_notes_and_the_run_says_where_it_is_instead(model, whole, far):
    run = finetune(model, far.out, save_minutes=1e-9, observe=AtStep(3, far.go))
    assert run.status == "done" and same(run, whole)
    assert run.report.reason == f"not all of it is in {far.out}: it is no longer mounted; it is whole in {far.local}"
    assert run.adapter_dir == far.local / "adapter"
    assert list(far.root.iterdir()) == [], "nothing is written to this machine's disk in its place"
    assert sum(n.startswith(f"not copied to {far.out}: it is no longer mounted") for n in notes(run)) <= 3
    assert "it is whole in" in str(run)
    far.come()
    again = finetune(model, far.out, resume=True)
    assert again.adapter_dir == far.out / "adapter" and weights(again.adapter_dir) == weights(whole.adapter_dir)
    assert again.report.reason == ""


def test_a_folder_that_comes_back_is_copied_to_again(model, whole, far):
    def observe(event: Any) -> None:
        AtStep(2, far.go)(event)
        AtStep(6, far.come)(event)

    run = finetune(model, far.out, save_minutes=1e-9, observe=observe)
    assert same(run, whole) and run.report.reason == "" and run.adapter_dir == far.out / "adapter"
    assert TOTAL in saved_steps(far.out)


def test_a_stopped_run_whose_folder_is_gone_goes_on_from_here(model, whole, far):
    def observe(event: Any) -> None:
        AtStep(2, far.go)(event)
        interrupt(event)

    interrupt = InterruptAfter(4)
    stopped = finetune(model, far.out, save_minutes=1e-9, observe=observe)
    assert stopped.report.reason.startswith("interrupted; not all of it is in")
    far.come()
    run = stopped.resume()
    assert not any("back from" in n for n in notes(run)) and same(run, whole)
    assert content(far.out / "adapter") == content(far.local / "adapter")


def test_a_folder_that_fills_up_costs_notes(model, whole, far):
    def fill() -> None:
        with (far.root / "theirs").open("wb") as file, pytest.raises(OSError, match="No space left"):
            for _ in range(300):
                file.write(bytes(1 << 20))

    run = finetune(model, far.out, save_minutes=1e-9, observe=AtStep(3, fill))
    assert run.status == "done" and same(run, whole)
    assert "No space left on device; it is whole in" in run.report.reason
    assert weights(run.adapter_dir) == weights(whole.adapter_dir) and run.adapter_dir.is_relative_to(far.local)
    with pytest.raises(OutOfDiskError, match=rf"^this run writes up to .*, and {far.out} has 0 MiB free"):
        plan(model, far.out)
    (far.root / "theirs").unlink()
    assert finetune(model, far.out, resume=True).adapter_dir == far.out / "adapter"


def test_a_pickled_run_finds_its_copies(model, far, monkeypatch, tmp_path):
    monkeypatch.chdir(far.root)
    run = finetune(model, Path("run1"), max_steps=1)
    assert run.report.adapter is not None and run.report.adapter.path == "run1/adapter"
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(pickle.dumps(run)).adapter_dir == far.out / "adapter"
    assert isinstance(run, nbqlora.Run)
