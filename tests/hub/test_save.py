"""A saved adapter: one folder, guarded by its manifest, files of others kept; damage is named with a way out."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import DiskError, ModelError, OutOfDiskError
from nbqlora.hub import save
from nbqlora.hub.adapter import check_adapter, whole_adapter
from nbqlora.hub.checkpoint import write_checkpoint
from nbqlora.hub.manifest import adapter_damage, read_manifest
from nbqlora.hub.refused import disk_errors
from nbqlora.hub.save import save_adapter
from tests import tiny

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.with_lora(tiny.make_model(num_hidden_layers=1))


@pytest.fixture(scope="module")
def other() -> Any:
    """Another run's, of the same shape."""
    return tiny.with_lora(tiny.make_model(num_hidden_layers=1), seed=1)


@pytest.fixture
def saved(model: Any, tmp_path: Path) -> Path:
    save_adapter(model, tiny.make_tokenizer(), tmp_path / "run", "demo")
    return tmp_path / "run" / "adapter"


def checkpoint(model: Any, run: Path, step: int) -> Path:
    settings: dict[str, Any] = {"base_name": "demo", "total_steps": 9, "identity": {}, "groups": {}, "state": {}}
    return write_checkpoint(run / "checkpoints", model=model, step=step, **settings).folder


def flip(file: Path, at: int = -1) -> None:
    changed = bytearray(file.read_bytes())
    changed[at] ^= 1
    file.write_bytes(changed)


@pytest.mark.parametrize("kind", ["lora", "dora", "modules_to_save", "trainable_token_indices"])
def test_the_file_is_peft_s_own_and_nothing_is_cloned_where_it_lies(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file

    more: dict[str, Any] = {
        "dora": {"use_dora": True},
        "modules_to_save": {"modules_to_save": ["lm_head"]},
        "trainable_token_indices": {"trainable_token_indices": [1, 5]},
    }.get(kind, {})
    model = get_peft_model(
        tiny.make_model(num_hidden_layers=1), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **more)
    )
    model.save_pretrained(tmp_path / "own", save_embedding_layers=False)
    buffer = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    at = 0
    for p in (p for p in model.parameters() if p.requires_grad):  # as fused layers leave them on a full card
        p.data, at = buffer[at : at + p.numel()].view_as(p), at + p.numel()
    with monkeypatch.context() as patched:
        patched.setattr(torch.Tensor, "clone", lambda *_, **__: pytest.fail("a tensor is cloned"))
        (tmp_path / "ours").mkdir()
        save.write_adapter(model, tmp_path / "ours", "demo")
    own, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("own", "ours"))
    assert own.keys() == ours.keys() and all(torch.equal(own[name], ours[name]) for name in own)


def test_plain_peft_and_transformers_load_the_folder(saved: Path, model: Any) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    ids = torch.arange(20)[None]
    plain = PeftModel.from_pretrained(tiny.make_model(num_hidden_layers=1), saved)
    assert torch.equal(plain(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(saved)("sun")["input_ids"] == tiny.make_tokenizer()("sun")["input_ids"]


def test_the_manifest_lists_what_was_written(saved: Path) -> None:
    manifest = read_manifest(saved)
    assert manifest is not None and adapter_damage(saved, all_files=True) == ""
    assert manifest.base_model.startswith("HuggingFaceTB/") and {"nbqlora", "peft", "torch"} <= manifest.versions.keys()
    assert manifest.files.keys() == {f.name for f in saved.iterdir()} - {"nbqlora.json", "README.md"}
    assert not any(f.name.startswith(".") for f in saved.parent.iterdir())


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f / WEIGHTS, 1000), rf"{WEIGHTS} has 1000 of \d+ bytes"),
    "a flipped bit": (lambda f: flip(f / WEIGHTS), f"{WEIGHTS} is not what was written"),
    "gone": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS} is missing"),
    "config cut": (lambda f: os.truncate(f / "adapter_config.json", 20), r"adapter_config.json has 20 of \d+ bytes"),
    "config gone": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json is missing"),
    "manifest cut": (lambda f: os.truncate(f / "nbqlora.json", 100), "nbqlora.json cannot be read"),
    "manifest changed": (
        lambda f: (f / "nbqlora.json").write_text((f / "nbqlora.json").read_text().replace("FaceTB", "FaceTA")),
        "nbqlora.json is not what was written",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage,said", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_where_a_whole_one_is(saved: Path, model: Any, other: Any, damage: Any, said: str) -> None:
    damage(saved)
    alone = f"the adapter in {re.escape(str(saved))} cannot be used: {said}; "
    own = "(if you changed it yourself, remove nbqlora.json; )?"
    with pytest.raises(ModelError, match=f"^{alone}{own}copy it again from where it is whole, or train again$"):
        check_adapter(saved)
    checkpoint(other, saved.parent, 7)
    same = checkpoint(model, saved.parent, 5)
    listed = "manifest" not in said and "nbqlora.json" not in said
    there = f"the same one in {same}" if listed else f"the one after step 7 of 9 in {same.parent / 'step-000007'}"
    with pytest.raises(ModelError, match=f"^{alone}{own}{re.escape(there)} is whole$"):
        check_adapter(saved)
    found = whole_adapter(saved)
    assert found.note.endswith(f"; using {there}") and found.note.startswith(f"the adapter in {saved} cannot be used: ")
    assert adapter_damage(found.folder) == "" and str(found.folder) in there


def test_a_whole_adapter_is_taken_as_it_is_and_a_damaged_checkpoint_is_not(saved: Path, model: Any) -> None:
    there = checkpoint(model, saved.parent, 5)
    assert whole_adapter(saved).folder == saved and whole_adapter(saved).note == ""
    os.truncate(saved / WEIGHTS, 10)
    assert whole_adapter(saved).folder == there
    flip(there / WEIGHTS)
    with pytest.raises(ModelError, match="copy it again from where it is whole"):
        whole_adapter(saved)


def test_files_swapped_between_two_adapters_are_found(saved: Path, other: Any, tmp_path: Path) -> None:
    save_adapter(other, tiny.make_tokenizer(), tmp_path / "second", "demo")
    second = tmp_path / "second" / "adapter"
    shutil.move(saved / WEIGHTS, tmp_path / "away")
    shutil.move(second / WEIGHTS, saved / WEIGHTS)
    shutil.move(tmp_path / "away", second / WEIGHTS)
    for folder in (saved, second):
        assert adapter_damage(folder) == f"{WEIGHTS} is not what was written"


def test_what_peft_does_not_read_may_change(saved: Path) -> None:
    (saved / "README.md").write_text("mine")
    flip(saved / "tokenizer.json")
    assert adapter_damage(saved) == ""
    assert adapter_damage(saved, all_files=True) == "tokenizer.json is not what was written"


def test_a_config_that_somebody_changed_is_refused_with_the_way_out(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/models/mine"}))
    with pytest.raises(ModelError, match=r"; if you changed it yourself, remove nbqlora\.json; copy it again"):
        check_adapter(saved)
    (saved / "nbqlora.json").unlink()
    check_adapter(saved)


@pytest.mark.parametrize(
    "damage,said",
    [
        (lambda f: os.truncate(f / WEIGHTS, 5), "adapter_model.safetensors is no safetensors file, or was cut: "),
        (lambda f: os.truncate(f / WEIGHTS, os.path.getsize(f / WEIGHTS) - 1), r"model.safetensors has \d+ bytes"),
        (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json is not JSON"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "adapter_config.json is no adapter's config"),
        (lambda f: (f / WEIGHTS).rename(f / "adapter_model.bin"), "is missing, and adapter_model.bin is a pickle"),
    ],
)  # fmt: skip
def test_an_adapter_that_peft_made_is_looked_at(model: Any, tmp_path: Path, damage: Any, said: str) -> None:
    model.save_pretrained(tmp_path)
    assert read_manifest(tmp_path) is None and adapter_damage(tmp_path) == ""
    damage(tmp_path)
    assert re.search(said, adapter_damage(tmp_path))


def test_a_manifest_of_a_later_release_guards_nothing_and_stops_nothing(saved: Path) -> None:
    text = (saved / "nbqlora.json").read_text()
    (saved / "nbqlora.json").write_text(text.replace('"format": 1', '"format": 99'))
    assert read_manifest(saved) is None and adapter_damage(saved) == ""
    os.truncate(saved / WEIGHTS, 100)
    assert "was cut" in adapter_damage(saved)


def test_files_of_somebody_else_stay_and_those_of_a_save_do_not(saved: Path, other: Any) -> None:
    (saved / "notes.txt").write_text("mine")
    (saved / "plots").mkdir()
    (saved / "plots" / "loss.png").write_bytes(b"png")
    (saved / "data").symlink_to("/nowhere/else")
    inode = (saved / "notes.txt").stat().st_ino
    manifest = read_manifest(saved)
    assert manifest is not None and "chat_template.jinja" in manifest.files
    plain = tiny.make_tokenizer(chat=False)
    save_adapter(other, plain, saved.parent, "demo")
    assert (saved / "notes.txt").read_text() == "mine" and (saved / "plots" / "loss.png").read_bytes() == b"png"
    assert (saved / "notes.txt").stat().st_ino == inode, "linked, not copied"
    assert os.readlink(saved / "data") == "/nowhere/else"
    assert not (saved / "chat_template.jinja").exists(), "of the former tokenizer"
    assert adapter_damage(saved, all_files=True) == ""
    assert [p.name for p in saved.parent.iterdir()] == ["adapter"]


def test_where_no_links_can_be_made_files_are_copied(saved: Path, other: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    (saved / "plots").mkdir()
    (saved / "plots" / "loss.png").write_bytes(b"png")
    monkeypatch.setattr(os, "link", refuse)
    save_adapter(other, tiny.make_tokenizer(), saved.parent, "demo")
    assert (saved / "plots" / "loss.png").read_bytes() == b"png"


def test_a_page_that_somebody_wrote_stays_and_ours_is_made_anew(saved: Path, other: Any) -> None:
    first = (saved / "README.md").read_text()
    save_adapter(other, tiny.make_tokenizer(), saved.parent, "org/base")
    second = (saved / "README.md").read_text()
    assert "SmolLM2" in first and "org/base" in second
    (saved / "README.md").write_text("my own page")
    for _ in range(2):
        save_adapter(other, tiny.make_tokenizer(), saved.parent, "org/base")
        assert (saved / "README.md").read_text() == "my own page"


def test_what_an_earlier_release_saved_is_replaced(saved: Path, other: Any) -> None:
    (saved / "nbqlora.json").unlink()
    before = (saved / WEIGHTS).read_bytes()
    told = save_adapter(other, tiny.make_tokenizer(), saved.parent, "demo")
    assert (saved / WEIGHTS).read_bytes() != before and adapter_damage(saved, all_files=True) == ""
    assert told.n_bytes == sum(f.stat().st_size for f in saved.iterdir()) and told.path == str(saved)


def test_too_little_room_is_said_before_anything_is_written(
    saved: Path, other: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(save, "ROOM_BYTES", 1 << 60)
    before = (saved / WEIGHTS).read_bytes()
    said = r"^saving the adapter needs .* GiB and .* has .* GiB free; free some room and run it again$"
    with pytest.raises(OutOfDiskError, match=said):
        save_adapter(other, tiny.make_tokenizer(), saved.parent, "demo")
    assert (saved / WEIGHTS).read_bytes() == before and adapter_damage(saved) == ""
    checkpoint(other, saved.parent, 3)
    with pytest.raises(OutOfDiskError, match=f"run it again; what was trained is in {saved.parent / 'checkpoints'}$"):
        save_adapter(other, tiny.make_tokenizer(), saved.parent, "demo")


@pytest.mark.parametrize(
    "error,kind,said",
    [
        (OSError(28, "No space left on device"), OutOfDiskError, "no: No space left on device; do"),
        (OSError(122, "Disk quota exceeded"), OutOfDiskError, "no: Disk quota exceeded; do"),
        (OSError(5, "Input/output error"), DiskError, "no: Input/output error; do"),
        (RuntimeError("cannot write (os error 28)"), OutOfDiskError, "no: No space left on device; do"),
        (RuntimeError("cannot write (os error 5)"), DiskError, "no: Input/output error; do"),
        (shutil.Error([("a", "b", "no room\nat all")]), DiskError, "no: "),
    ],
)
def test_what_the_disk_refuses_is_one_line(error: Exception, kind: type[Exception], said: str) -> None:
    with pytest.raises(DiskError, match=f"^{said}") as caught, disk_errors("no", "do"):
        raise error
    assert type(caught.value) is kind and "\n" not in str(caught.value) and caught.value.__cause__ is error


@pytest.mark.parametrize("error", [ValueError("mine"), ModelError("mine"), KeyboardInterrupt()])
def test_what_is_not_the_disks_is_left_alone(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, disk_errors("no", "do"):
        raise error
    assert caught.value is error
