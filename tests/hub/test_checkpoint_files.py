"""A checkpoint on disk: whole or not there, readable by plain PEFT, free of code, found out when damaged."""

from __future__ import annotations

import json
import os
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import DiskError, ModelError, OutOfDiskError
from nbqlora.hub import checkpoint as checkpoints
from nbqlora.hub.atomic import new_folder, remove_folder, remove_leftovers, save_json, write_json
from nbqlora.hub.checkpoint import find_checkpoints, load_adapter_weights, prune_checkpoints, write_checkpoint
from nbqlora.hub.sealed import first_damage, read_sealed, sealed
from tests import tiny

GROUPS = {
    "optimizer": {"a:step": torch.tensor(3.0), "a:exp_avg": torch.randn(4, 5), "b:state1": torch.arange(9).byte()},
    "rng": {"torch": torch.get_rng_state(), "python_spare": torch.tensor([], dtype=torch.float64)},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.with_lora(tiny.make_model())


@pytest.fixture
def write(model: Any, tmp_path: Path) -> Callable[..., checkpoints.Checkpoint]:
    def write_one(step: int, identity: Any = "mine", **changes: Any) -> checkpoints.Checkpoint:
        settings = {"model": model, "base_name": "demo", "total_steps": 40, "groups": GROUPS, "state": {"x": 0.1}}
        return write_checkpoint(tmp_path, step=step, identity={"run": identity}, **{**settings, **changes})

    return write_one


def steps(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_what_was_written_is_read_back(write, tmp_path):
    write(7), write(12)
    found, unreadable = find_checkpoints(tmp_path)
    assert [c.step for c in found] == [12, 7] and unreadable == []
    first = found[0]
    assert (first.total_steps, first.identity, first.state, first.damage()) == (40, {"run": "mine"}, {"x": 0.1}, "")
    for name, group in GROUPS.items():
        read = first.tensors(name)
        assert read.keys() == group.keys()
        assert all(torch.equal(read[k], t) and read[k].dtype == t.dtype for k, t in group.items())
    assert first.n_bytes == sum(f.stat().st_size for f in first.folder.iterdir() if f.name != "state.json")


def test_plain_peft_loads_the_folder(write, model):
    from peft import PeftModel

    folder = write(1).folder
    plain = PeftModel.from_pretrained(tiny.make_model(), folder)
    ids = torch.arange(20)[None]
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("Hugging")


def test_every_byte_is_json_text_or_a_tensor(write):
    for file in write(1).folder.iterdir():
        if file.suffix == ".json":
            json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
        elif file.suffix == ".safetensors":
            held = file.read_bytes()
            length = int.from_bytes(held[:8], "little")
            header = json.loads(held[8 : 8 + length])
            header.pop("__metadata__", None)
            assert 8 + length + max(t["data_offsets"][1] for t in header.values()) == len(held), file.name
        else:
            assert file.name == "README.md"


def test_the_adapter_goes_back_on_a_fresh_model_bit_for_bit(write, model):
    fresh = tiny.with_lora(tiny.make_model(), seed=9)
    load_adapter_weights(fresh, write(1).folder)
    wanted = tiny.lora_parameters(model)
    assert all(torch.equal(p, wanted[name]) and p.requires_grad for name, p in tiny.lora_parameters(fresh).items())


@pytest.mark.parametrize("changes", [{"r": 8}, {"target_modules": ["q_proj"]}], ids=str)
def test_an_adapter_of_another_shape_is_refused(write, changes):
    with pytest.raises(ModelError, match=r"the adapter in .*step-000001 is not for this model: base_model.* differs"):
        load_adapter_weights(tiny.with_lora(tiny.make_model(), **changes), write(1).folder)


def test_a_disk_that_refuses_in_the_middle_leaves_what_was_there(write, tmp_path):
    write(1)
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"optimizer": {"a": torch.zeros(1 << 20)}}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(OSError, match=r"(checkpoint of step 2 cannot be written|File too large)"):
            write(2, groups=big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before
    assert steps(tmp_path) == ["step-000001"]


def test_too_little_room_is_said_before_anything_is_written(write, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "ROOM_BYTES", 1 << 60)
    said = r"the checkpoint of step 3 needs .* GiB and .* has .* GiB free; free some room for the next one"
    with pytest.raises(OutOfDiskError, match=said):
        write(3)
    assert steps(tmp_path) == []


def test_a_number_that_json_cannot_hold_is_a_mistake_here_and_not_in_the_file(write, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(1, state={"x": float("nan")})
    assert steps(tmp_path) == []


def test_the_same_step_again_takes_the_place_of_the_former(write, tmp_path):
    write(1, state={"x": 1})
    assert write(1, state={"x": 2}).state == {"x": 2}
    assert steps(tmp_path) == ["step-000001"]


def flip(file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda f: os.truncate(f / "rng.safetensors", 10), r"rng.safetensors has 10 of \d+ bytes"),
        (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: flip(f / "optimizer.safetensors"), "optimizer.safetensors is not what was written"),
    ],
)
def test_damage_is_found_and_named(write, damage, said):
    written = write(1)
    damage(written.folder)
    assert re.fullmatch(said, written.damage())


def test_what_cannot_be_read_is_named(write, tmp_path):
    os.truncate(write(1).folder / "state.json", 100)
    (write(2).folder / "state.json").unlink()
    state = write(3).folder / "state.json"
    state.write_text(state.read_text().replace('"format": 2', '"format": 3'))
    found, unreadable = find_checkpoints(tmp_path)
    assert [c.step for c in found] == []
    assert unreadable == [
        "step-000001: state.json cannot be read",
        "step-000002: it has no state.json",
        "step-000003: it was written in format 3, and this release reads 2",
    ]
    assert find_checkpoints(tmp_path / "nowhere") == ([], [])


def test_a_state_that_was_changed_is_no_state(write, tmp_path):
    text = (write(1, state={"x": 0.125}).folder / "state.json").read_text()
    changes = {
        "a value": text.replace("0.125", "0.126"),
        "a digest of a file": text.replace(json.loads(text)["files"]["rng.safetensors"][1][:8], "0" * 8),
        "its own digest": text.replace(json.loads(text)["sha256"][:8], "0" * 8),
        "no digest": text.replace('"sha256"', '"sha257"'),
        "a list": "[]",
        "deep": "[" * 100_000,
        "infinite": text.replace('"step": 1', '"step": Infinity'),
    }
    for what, changed in changes.items():
        assert changed != text
        (tmp_path / "step-000001" / "state.json").write_text(changed)
        assert find_checkpoints(tmp_path) == ([], ["step-000001: state.json cannot be read"]), what
    (tmp_path / "step-000001" / "state.json").write_text(text)
    assert find_checkpoints(tmp_path)[0][0].damage() == ""


@pytest.mark.parametrize(
    "files", [{}, {"adapter_model.safetensors": [1, "a"]}, {"../x": [1, "a"]}, {"a": [1]}, [], {"a": "bc"}], ids=str
)
def test_a_state_that_lists_no_adapter_or_files_elsewhere_is_no_state(write, tmp_path, files):
    file = write(1).folder / "state.json"
    value = read_sealed(file, form=checkpoints.FORMAT)
    write_json(sealed({**value, "files": files}, form=checkpoints.FORMAT), file)
    assert find_checkpoints(tmp_path) == ([], ["step-000001: state.json cannot be read"])


def test_a_file_that_the_disk_does_not_give_back_is_damage(tmp_path):
    (tmp_path / "a").symlink_to("/proc/self/mem")
    assert first_damage(tmp_path, {"a": (0, "")}) == "a cannot be read: Input/output error"


def test_a_disk_that_gives_back_something_else_is_an_error_at_once(write, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "write_json", lambda value, file: file.write_text("{"))
    with pytest.raises(DiskError, match=r"step-000001 does not give back what was written to it: "):
        write(1)


def test_a_tensor_is_read_when_it_is_asked_for_and_a_cut_file_is_an_error(write):
    written = write(1)
    tensors = written.tensors("optimizer")
    cut = os.path.getsize(written.folder / "optimizer.safetensors") - 1
    os.truncate(written.folder / "optimizer.safetensors", cut)
    with pytest.raises(ModelError, match="ends early: it was cut after it was opened"):
        _ = [tensors[name] for name in tensors]
    with pytest.raises(ModelError, match=f"has {cut} bytes, and its header speaks of"):
        written.tensors("optimizer")
    (written.folder / "optimizer.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        written.tensors("optimizer")


def test_a_cut_adapter_does_not_end_the_process(write):
    folder = write(1).folder
    os.truncate(folder / "adapter_model.safetensors", os.path.getsize(folder / "adapter_model.safetensors") - 1)
    with pytest.raises(ModelError, match="it was cut, or copied badly"):
        load_adapter_weights(tiny.with_lora(tiny.make_model()), folder)


def test_the_last_and_the_furthest_stay(write, tmp_path):
    write(90), write(5, "other"), write(10), write(20), write(30)
    (write(40).folder / "state.json").unlink()
    prune_checkpoints(tmp_path, keep=2, is_own=lambda c: c.identity == {"run": "mine"})
    assert steps(tmp_path) == ["step-000020", "step-000030", "step-000090"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    with pytest.raises(LookupError), new_folder(tmp_path / "a") as folder:
        (folder / "half").write_text("x")
        assert steps(tmp_path) == [folder.name] and folder.name.startswith(".saving-a-")
        raise LookupError
    assert steps(tmp_path) == []
    with new_folder(tmp_path / "a") as folder:
        (folder / "whole").write_text("x")
    assert (tmp_path / "a" / "whole").read_text() == "x"
    with pytest.raises(OSError), new_folder(tmp_path / "a") as folder:
        (folder / "second").write_text("y")
    assert steps(tmp_path) == ["a"] and steps(tmp_path / "a") == ["whole"]


def test_leftovers_go_and_nothing_else(tmp_path):
    (tmp_path / ".saving-a-1").mkdir()
    (tmp_path / ".saving-b-1").write_text("")
    (tmp_path / "kept").mkdir()
    remove_leftovers(tmp_path)
    assert steps(tmp_path) == ["kept"]
    remove_folder(tmp_path / "kept")
    assert steps(tmp_path) == []


def test_json_is_replaced_whole(tmp_path):
    save_json({"a": 1}, tmp_path / "new" / "x.json")
    with pytest.raises(TypeError):
        save_json({"a": object()}, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": 1}
    assert steps(tmp_path / "new") == ["x.json"]
