"""A run whose files were damaged, mixed up or planted goes on from what is whole, or says so and touches nothing."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import RunError
from nbqlora.core.events import NoteEvent
from nbqlora.hub.adapter import whole_adapter
from nbqlora.hub.manifest import adapter_damage
from nbqlora.train.trainer import QLoraTrainer
from tests.hub.faults import content
from tests.hub.pickles import opened_files, plant
from tests.mounts import mounted
from tests.run.resuming import TOTAL, edit_state, figures, finetune, same, saved_steps, weights

pytestmark = pytest.mark.usefixtures("quick")
WEIGHTS = "adapter_model.safetensors"


def step_folder(out: Path, step: int) -> Path:
    return out / "checkpoints" / f"step-{step:06d}"


def swap_files(one: Path, other: Path) -> None:
    away = one.with_name("away")
    one.rename(away), other.rename(one), away.rename(other)


def flip_in_state(out: Path, step: int) -> None:
    """A digit of a loss that was told, so that the JSON stays JSON."""
    file = step_folder(out, step) / "state.json"
    changed = re.sub(r'("seconds": \d+\.)(\d)', lambda m: m[1] + str(9 - int(m[2])), file.read_text())
    assert changed != file.read_text()
    file.write_text(changed)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "weights swapped with another step's": (
        lambda out: swap_files(step_folder(out, 5) / WEIGHTS, step_folder(out, 2) / WEIGHTS),
        f"step-000005: {WEIGHTS} is not what was written",
    ),
    "a digit of the state": (lambda out: flip_in_state(out, 5), "step-000005: state.json cannot be read"),
    "another format": (
        lambda out: (step_folder(out, 5) / "state.json").write_text('{"format": 99}'),
        "step-000005: it was written in format 99, and this release reads 2",
    ),
    "a file in place of the folder": (
        lambda out: (shutil.rmtree(step_folder(out, 5)), step_folder(out, 5).write_text("x")),
        "step-000005: state.json cannot be read",
    ),
    "a link to nowhere": (
        lambda out: (shutil.rmtree(step_folder(out, 5)), step_folder(out, 5).symlink_to("/nowhere")),
        "step-000005: it has no state.json",
    ),
    "a link in place of a file": (
        lambda out: (
            (step_folder(out, 5) / "optimizer.safetensors").unlink(),
            (step_folder(out, 5) / "optimizer.safetensors").symlink_to(step_folder(out, 3) / "optimizer.safetensors"),
        ),
        r"step-000005: optimizer.safetensors (is not what was written|has \d+ of \d+ bytes)",
    ),
}


@pytest.mark.parametrize("damage,reason", DAMAGES.values(), ids=DAMAGES)
def test_a_run_goes_on_from_the_last_whole_checkpoint(model, killed, whole, damage, reason):
    out = killed(5)
    damage(out)
    run = finetune(model, out, resume=True)
    assert any(re.fullmatch(f"passed over {reason}", n) for n in run.plan.notes), run.plan.notes
    assert any(n.startswith("goes on after step 4 of 9") for n in run.plan.notes)
    assert same(run, whole) and saved_steps(out) == [4, TOTAL], "what cannot be used is removed when there is a new one"


def test_folders_with_each_others_names_are_known_by_what_they_hold(model, killed, whole):
    out = killed(5)
    swap_files(step_folder(out, 5), step_folder(out, 1))
    run = finetune(model, out, resume=True)
    assert any(n.startswith("goes on after step 5 of 9") for n in run.plan.notes) and same(run, whole)


def test_a_checkpoint_behind_a_link_is_gone_on_from_and_not_removed(model, killed, whole, tmp_path):
    out = killed(3)
    shutil.move(step_folder(out, 3), tmp_path / "elsewhere")
    step_folder(out, 3).symlink_to(tmp_path / "elsewhere")
    before = content(tmp_path / "elsewhere")
    run = finetune(model, out, resume=True, save_minutes=1e-9)
    assert any(n.startswith("goes on after step 3 of 9") for n in run.plan.notes) and same(run, whole)
    assert saved_steps(out) == [8, 9] and content(tmp_path / "elsewhere") == before


def test_other_versions_are_said_and_the_run_goes_on(model, killed, whole):
    out = killed(5)
    edit_state(out, 5, lambda state: state["state"]["versions"].update(torch="2.6.0", peft="0.19.0"))
    run = finetune(model, out, resume=True)
    (said,) = (n for n in run.plan.notes if n.startswith("other versions"))
    assert re.fullmatch(r"other versions: torch 2.6.0 -> .*, peft 0.19.0 -> .*; the last digits may differ", said)
    assert same(run, whole)


def test_with_nothing_whole_the_run_is_refused_and_nothing_is_touched(model, killed):
    out = killed(3)
    for step in (1, 2):
        os.truncate(step_folder(out, step) / WEIGHTS, 100)
    (step_folder(out, 3) / "state.json").write_text('{"format": 1}')
    before = content(out)
    with pytest.raises(RunError) as caught:
        finetune(model, out, resume=True)
    size = r"adapter_model.safetensors has 100 of \d+ bytes"
    lines = [
        rf"{re.escape(str(out))} holds no checkpoint to go on from; nothing of it was touched",
        "  step-000003: it was written in format 1, and this release reads 2",
        f"  step-000002: {size}",
        f"  step-000001: {size}",
        "  run it without resuming to start from the beginning, which replaces them",
    ]
    assert re.fullmatch("\n".join(lines), str(caught.value))
    assert content(out) == before
    run = finetune(model, out, max_steps=1)
    assert run.status == "done" and saved_steps(out) == [1]


def test_an_optimizer_of_one_buffer_goes_on_with_single_parameters(model, killed, whole, monkeypatch):
    """As on a card where not every layer can be replaced: the same steps, rounded otherwise at most."""
    out = killed(5)
    monkeypatch.setattr(QLoraTrainer, "_all_adapters", lambda self: None)
    stepped: list[int] = []
    create = QLoraTrainer.create_optimizer

    def counted(self: Any, model: Any = None) -> Any:
        optimizer = create(self, model)
        stepped.append(sum(len(group["params"]) for group in optimizer.param_groups))
        return optimizer

    monkeypatch.setattr(QLoraTrainer, "create_optimizer", counted)
    run = finetune(model, out, resume=True)
    assert stepped[0] > 10, "single parameters, where the run had one buffer"
    pairs = zip(figures(run), figures(whole), strict=True)
    assert all(a[2] == pytest.approx(b[2], rel=1e-4) for a, b in pairs if len(a) > 3)


def test_planted_pickles_are_never_opened(model, killed, whole, tmp_path):
    out, base = killed(4), Path(shutil.copytree(model, tmp_path / "base"))
    names = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin")
    (out / "adapter").mkdir()
    for folder in (out, out / "adapter", step_folder(out, 4), base):
        for name in (*names, "adapter_model.bin", "trainer_state.pkl"):
            plant(folder / name, tmp_path / "trace")
    with opened_files() as opened:
        run = finetune(base, out, resume=True)
        run.free()
        run.chat("sun", max_new_tokens=2)
    assert [n for n in opened if n.endswith((".pt", ".pth", ".bin", ".pkl")) and str(tmp_path) in n] == []
    assert not (tmp_path / "trace").exists() and same(run, whole)
    assert (run.adapter_dir / "optimizer.pt").is_file(), "not ours to remove"


def test_a_damaged_adapter_is_not_talked_to_but_the_same_one_in_the_checkpoint_is(model, tmp_path):
    run = finetune(model, tmp_path / "out")
    said = run.chat("sun", max_new_tokens=4)
    run.free()
    changed = bytearray((run.adapter_dir / WEIGHTS).read_bytes())
    changed[-2] ^= 1
    (run.adapter_dir / WEIGHTS).write_bytes(changed)
    there = step_folder(tmp_path / "out", TOTAL)
    message = f"{WEIGHTS} is not what was written; using the same one in {there}"
    with pytest.warns(UserWarning, match=re.escape(message)):
        assert run.chat("sun", max_new_tokens=4) == said
    run.free()
    found = whole_adapter(run.adapter_dir)
    assert found.folder == there and found.note.endswith(f"using the same one in {there}")
    shutil.copytree(there, run.adapter_dir, dirs_exist_ok=True)
    assert run.chat("sun", max_new_tokens=4) == said


def test_a_disk_that_fills_up_costs_checkpoints_and_the_adapter_goes_to_another_and_the_former_one_stays(
    model, whole, tmp_path, monkeypatch
):
    """A real disk: what was reserved for others is gone when the run saves."""
    monkeypatch.setattr("nbqlora.run.look.where_to_save", lambda *args: _anywhere(args[-1]))
    for module in ("save", "checkpoint"):
        monkeypatch.setattr(f"nbqlora.hub.{module}.ROOM_BYTES", 0)
    with mounted(tmp_path / "small", "8m") as disk:
        first = finetune(model, disk / "run", max_steps=1)
        shutil.rmtree(disk / "run" / "checkpoints")
        before = content(disk / "run" / "adapter")
        _fill(disk, leave=64 << 10)
        told: list[Any] = []
        monkeypatch.chdir(tmp_path)
        elsewhere = finetune(model, disk / "run", save_minutes=1e-9, observe=told.append)
        assert elsewhere.status == "done" and not elsewhere.adapter_dir.is_relative_to(disk)
        assert weights(elsewhere.adapter_dir) == weights(whole.adapter_dir)
        said = r"the adapter cannot be saved in .*/adapter: No space left on device; .*; so the adapter is in "
        assert [e.text for e in told if isinstance(e, NoteEvent) and re.match(said, e.text)]
        lost = [e.text for e in told if isinstance(e, NoteEvent) and e.text.startswith("no checkpoint")]
        assert len(lost) == TOTAL and all(text.endswith("for the next one; the run goes on") for text in lost), lost
        assert content(disk / "run" / "adapter") == before and adapter_damage(first.adapter_dir, all_files=True) == ""
        (disk / "ballast").unlink()
        run = finetune(model, disk / "run")
        assert run.status == "done" and weights(run.adapter_dir) == weights(whole.adapter_dir)
        assert not any(p.name.startswith(".saving-") for p in disk.rglob("*"))


def _anywhere(output_dir: Path) -> Any:
    from nbqlora.run.preflight import Saving

    return Saving(work_dir=output_dir)


def _fill(disk: Path, leave: int) -> None:
    with (disk / "ballast").open("wb", buffering=0) as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - leave)))
