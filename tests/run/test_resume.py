"""What a run says about checkpoints: how it begins, what it refuses, what changed, what it keeps and removes."""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import ConfigError, NonFiniteLossError, RunError
from nbqlora.core.events import StepEvent
from nbqlora.core.request import CellRequest
from nbqlora.run.steps import how_to_resume, make_plan
from tests import tiny
from tests.run.resuming import (
    OPTIONS,
    ROWS,
    TOTAL,
    InterruptAfter,
    edit_state,
    finetune,
    notes,
    plan,
    same,
    saved_steps,
    weights,
)

pytestmark = pytest.mark.usefixtures("quick")


def test_a_resumed_run_says_after_which_step_and_how_long_ago(model, killed):
    out = killed(4)
    edit_state(out, 4, lambda state: state.update(saved_at=state["saved_at"] - 3600))
    run = finetune(model, out, resume=True)
    (said,) = (n for n in run.plan.notes if n.startswith("goes on"))
    assert re.fullmatch(r"goes on after step 4 of 9, saved 1 h 00 min ago", said)
    assert "resumed" + said.removeprefix("goes on") in notes(run)
    assert not any("earlier run" in n for n in run.plan.notes)


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(model, tmp_path):
    run = finetune(model, tmp_path, max_steps=1, resume=True)
    assert f"{tmp_path} holds no checkpoint to go on from: this run starts from the beginning" in run.plan.notes
    assert len(run.report.steps) == 1


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f / "optimizer.safetensors", 1000), r"optimizer.safetensors has 1000 of \d+ bytes"),
    "gone": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors is missing"),
    "state cut": (lambda f: os.truncate(f / "state.json", 200), "state.json cannot be read"),
    "no state": (lambda f: (f / "state.json").unlink(), "it has no state.json"),
}


@pytest.mark.parametrize("damage,reason", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(model, killed, whole, damage, reason):
    out = killed(5)
    damage(out / "checkpoints" / "step-000005")
    run = finetune(model, out, resume=True)
    (said,) = (n for n in run.plan.notes if n.startswith("passed over"))
    assert re.fullmatch(f"passed over step-000005: {reason}", said)
    assert any(n.startswith("goes on after step 4 of 9") for n in run.plan.notes)
    assert same(run, whole)
    assert saved_steps(out) == [4, TOTAL], "what is damaged is removed when there is a new one"


def test_a_changed_byte_is_found(model, killed):
    out = killed(2)
    file = out / "checkpoints" / "step-000002" / "optimizer.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-100] ^= 1
    file.write_bytes(changed)
    run = finetune(model, out, resume=True, max_minutes=1e-9)
    assert "passed over step-000002: optimizer.safetensors is not what was written" in run.plan.notes
    assert [e.step for e in run.report.steps] == [1, 2]


def test_a_folder_moved_to_another_place_goes_on(model, killed, whole, tmp_path, monkeypatch):
    shutil.move(killed(6), tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    assert same(finetune(model, Path("elsewhere"), resume=True), whole)


def test_a_run_started_anew_offers_the_checkpoints_and_leaves_them(model, killed, whole):
    out = killed(7)
    told = []
    for source, line_of, how in (
        ("this cell", {}, "write %%finetune run1 --resume"),
        ("job.toml", {"model": 1}, "run nbqlora finetune job.toml --resume"),
        ("the options", {}, "call it with resume=True"),
    ):
        options = {**OPTIONS, "model": str(model), "data": ROWS, "output_dir": str(out)}
        request = CellRequest(options=options, source=source, line_of=line_of)
        assert how_to_resume(request, "run1") == how
        told += [n for n in make_plan(request, name="run1").notes if "of this same run" in n]
        offer = rf"{re.escape(str(out))} holds 7 of 9 steps of this same run, saved (....-..-.. )?\d\d:\d\d; stop this "
        assert re.fullmatch(rf"{offer}and {re.escape(how)} to go on from there", told[-1])
    anew = finetune(model, out, save_minutes=1e-9, observe=InterruptAfter(2))
    assert anew.plan.notes.count(told[-1]) == 1 and [e.step for e in anew.report.steps] == [1, 2, 3]
    assert 7 in saved_steps(out), "the furthest is never removed"
    run = finetune(model, out, resume=True)
    assert any(n.startswith("goes on after step 7 of 9") for n in run.plan.notes) and same(run, whole)


def test_a_date_is_told_when_it_was_not_today(model, killed):
    out = killed(1)
    edit_state(out, 1, lambda state: state.update(saved_at=1.6e9))
    assert any(re.search(r"saved 2020-09-1\d \d\d:\d\d; stop this", n) for n in plan(model, out).notes)


def test_a_finished_run_offers_nothing(model, whole):
    out = whole.adapter_dir.parent
    found = plan(model, out).notes
    assert f"{out} holds the adapter of an earlier run, which this one replaces" in found
    assert not any("steps of" in n for n in found)


def test_checkpoints_of_another_run_are_replaced_at_the_first_save(model, killed):
    out = killed(7)
    told: list[Any] = []

    def look_on(event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == 1:
            told.append(saved_steps(out))

    run = finetune(model, out, seed=7, max_steps=1, observe=look_on)
    assert f"{out} holds 7 of 9 steps of another run; they are replaced when this run first saves" in run.plan.notes
    assert told == [[1, 2, 3, 4, 5, 6, 7]] and saved_steps(out) == [1]


def test_the_last_n_are_kept(model, tmp_path):
    finetune(model, tmp_path / "2", save_minutes=1e-9)
    assert saved_steps(tmp_path / "2") == [8, 9]
    finetune(model, tmp_path / "4", save_minutes=1e-9, trl={"save_total_limit": 4})
    assert saved_steps(tmp_path / "4") == [6, 7, 8, 9]
    with pytest.raises(ConfigError, match="save_total_limit  expected a whole number of at least 1, got 0"):
        finetune(model, tmp_path, trl={"save_total_limit": 0})


def test_a_disk_without_room_costs_the_checkpoint_and_not_the_run(model, tmp_path, monkeypatch, whole):
    monkeypatch.setattr("nbqlora.hub.checkpoint.ROOM_BYTES", 1 << 60)
    run = finetune(model, tmp_path)
    assert run.status == "done" and weights(run.adapter_dir) == weights(whole.adapter_dir)
    (said,) = (n for n in notes(run) if n.startswith("no checkpoint"))
    expected = (
        r"no checkpoint of step 9: the checkpoint of step 9 needs .* GiB and .* free; free some .*; the run goes on"
    )
    assert re.fullmatch(expected, said)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_what_a_killed_write_left_is_removed_at_the_next_start(model, killed):
    out = killed(8)
    (out / "checkpoints" / ".saving-step-000009-1234").mkdir()
    (out / ".saving-adapter-1234").mkdir()
    (out / ".saving-run.json-1234").write_text("{")
    finetune(model, out, resume=True)
    assert not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_and_says_where_it_goes_on(tmp_path):
    bad = tiny.save_model(tmp_path / "bad", bad_token="~")
    rows = [*ROWS, {"messages": [{"role": "user", "content": "~"}, {"role": "assistant", "content": "sun"}]}]
    with pytest.raises(NonFiniteLossError, match=r"\n  call it with resume=True to go on after step \d of 9$"):
        finetune(bad, tmp_path / "out", data=rows, save_minutes=1e-9, seed=3)
    assert saved_steps(tmp_path / "out")


def test_an_error_of_the_users_own_gets_a_note(model, tmp_path):
    def fail(event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == 3:
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine") as caught:
        finetune(model, tmp_path, save_minutes=1e-9, observe=fail)
    assert caught.value.__notes__ == ["\n  call it with resume=True to go on after step 2 of 9"]


def test_a_finished_run_has_nothing_to_resume(whole):
    with pytest.raises(RunError, match="run is done: all 9 steps were taken"):
        whole.resume()


def test_a_pickled_run_goes_on_from_another_folder(model, tmp_path, monkeypatch, whole):
    monkeypatch.chdir(tmp_path)
    stopped = pickle.loads(pickle.dumps(finetune(model, Path("out"), observe=InterruptAfter(3))))
    (tmp_path / "away").mkdir()
    monkeypatch.chdir("away")
    assert same(stopped.resume(), whole)
    assert list((tmp_path / "away").iterdir()) == []
