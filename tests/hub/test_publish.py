"""What is sent to a hub, over real HTTP: known files only, no word of this machine, no token."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants

from nbqlora.core.errors import PublishError
from nbqlora.hub.account import writer
from nbqlora.hub.adapter import check_adapter
from nbqlora.hub.publish import publish
from nbqlora.hub.save import save_adapter
from tests import tiny
from tests.hub.hub_server import GOOD_TOKEN
from tests.hub.upload_server import READ_TOKEN, Store

pytest_plugins = ["tests.hub.uploads"]
ADAPTER_FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "nbqlora.json",
    "tokenizer.json", "tokenizer_config.json",
}  # fmt: skip


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


def front(folder: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((folder / "README.md").read_text().split("---")[1]))


def test_an_adapter_is_published_as_it_is_and_nothing_beside_it(adapter: Path, store: Store) -> None:
    said: list[str] = []
    url = publish(adapter, "me/sun", token=GOOD_TOKEN, say=said.append)
    assert url == f"{constants.ENDPOINT}/me/sun" and store.private == {"me/sun": True} and said == []
    there = store.folder("me/sun")
    assert names(there) == ADAPTER_FILES
    for name in ADAPTER_FILES - {"README.md"}:
        assert (there / name).read_bytes() == (adapter / name).read_bytes()
    check_adapter(there)
    assert store.messages == ["adapter of nbqlora 0.1.0"]


def test_what_was_published_loads_with_peft_and_its_page_says_how(adapter: Path, store: Store) -> None:
    from peft import PeftModel

    publish(adapter, "me/sun", token=GOOD_TOKEN)
    there = store.folder("me/sun")
    loaded = PeftModel.from_pretrained(tiny.make_model(), str(there))
    batch = tiny.padded_batch()
    expected = tiny.with_lora(tiny.make_model())(**batch).loss
    assert loaded(**batch).loss == pytest.approx(expected.item(), abs=1e-6)
    assert front(there) == {
        "base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft",
        "pipeline_tag": "text-generation", "tags": ["lora", "qlora", "nbqlora"],
    }  # fmt: skip
    page = (there / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "me/sun")' in page
    assert "license" not in page


def test_a_name_without_an_owner_is_of_the_tokens_account(adapter: Path, store: Store) -> None:
    assert publish(adapter, "sun", token=GOOD_TOKEN).endswith("/me/sun")
    assert publish(adapter, "club/sun", token=GOOD_TOKEN).endswith("/club/sun")


def test_a_branch_and_a_message(adapter: Path, store: Store) -> None:
    for _ in range(2):
        url = publish(adapter, "me/sun", token=GOOD_TOKEN, revision="second", commit_message="more rows")
    assert url.endswith("/me/sun/tree/second") and store.messages == ["more rows", "more rows"]
    assert names(store.folder("me/sun", "second")) == ADAPTER_FILES and not store.folder("me/sun").exists()


def test_a_merged_model_loads_with_transformers(merged: Path, store: Store) -> None:
    from transformers import AutoModelForCausalLM

    (merged / "nbqlora_merge.json").write_text("{}")
    (merged / "notes.json").write_text("{}")
    publish(merged, "me/moon", kind="merged", token=GOOD_TOKEN, base_model="org/base")
    there = store.folder("me/moon")
    assert {"config.json", "model.safetensors", "nbqlora_merge.json", "tokenizer.json"} < names(there)
    assert "notes.json" not in names(there)
    assert AutoModelForCausalLM.from_pretrained(there).num_parameters() > 0
    assert front(there)["library_name"] == "transformers" and front(there)["base_model_relation"] == "finetune"


def test_gguf_files_by_folder_or_one_of_them(tmp_path: Path, store: Store) -> None:
    folder = tmp_path / "gguf"
    folder.mkdir()
    for name in ("sun-Q8_0.gguf", "sun-F16.gguf", ".saving-sun.gguf"):
        (folder / name).write_bytes(b"GGUF" + name.encode())
    publish(folder, "me/both", kind="gguf", token=GOOD_TOKEN)
    assert names(store.folder("me/both")) == {"README.md", "sun-Q8_0.gguf", "sun-F16.gguf"}
    publish(folder / "sun-Q8_0.gguf", "me/one", kind="gguf", token=GOOD_TOKEN)
    there = store.folder("me/one")
    assert names(there) == {"README.md", "sun-Q8_0.gguf"} and front(there)["library_name"] == "gguf"
    assert "llama-cli --hf-repo me/one --hf-file sun-Q8_0.gguf" in (there / "README.md").read_text()


def local_adapter(tmp_path: Path, tiny_folder: Path) -> Path:
    model = tiny.with_lora(tiny.make_model())
    return Path(save_adapter(model, tiny.make_tokenizer(), tmp_path / "mine", str(tiny_folder)).path)


def test_a_base_on_this_machine_is_named_without_its_folder_and_that_is_said(
    tmp_path: Path, tiny_folder: Path, store: Store
) -> None:
    adapter, said = local_adapter(tmp_path, tiny_folder), list[str]()
    before = (adapter / "adapter_config.json").read_bytes()
    publish(adapter, "me/sun", token=GOOD_TOKEN, say=said.append)
    assert said == [
        f"adapter_config.json named {tiny_folder}: published as {tiny_folder.name}; "
        "base_model names where others find it"
    ]
    there = store.folder("me/sun")
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_folder.name
    assert not [f for f in there.iterdir() if str(tiny_folder).encode() in f.read_bytes()]
    check_adapter(there)
    assert "base_model" not in front(there)
    assert (adapter / "adapter_config.json").read_bytes() == before
    publish(adapter, "me/sun", token=GOOD_TOKEN, base_model="org/base", say=said.append)
    assert said[1:] == [f"adapter_config.json named {tiny_folder}: published as org/base"]
    assert json.loads((there / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert front(there)["base_model"] == "org/base"


def test_a_base_that_the_hub_lacks_is_not_called_its(adapter: Path, store: Store) -> None:
    for base in ("org/missing", "gpt2"):
        config = json.loads((adapter / "adapter_config.json").read_text())
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        for name in ("nbqlora.json", "README.md"):
            (adapter / name).unlink(missing_ok=True)
        publish(adapter, "me/sun", token=GOOD_TOKEN)
        assert "base_model" not in front(store.folder("me/sun"))


def test_folders_that_libraries_wrote_down_are_left_out(merged: Path, store: Store) -> None:
    said: list[str] = []
    for name, value in (("config.json", "/content/models/llama"), ("tokenizer_config.json", "./llama")):
        file = merged / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "_name_or_path": value, "name_or_path": "a/b"}))
    (merged / "nbqlora_merge.json").write_text("{}")
    publish(merged, "me/moon", kind="merged", token=GOOD_TOKEN, say=said.append)
    there = store.folder("me/moon")
    assert said == [
        "config.json named /content/models/llama: published without it",
        "tokenizer_config.json named ./llama: published without it",
    ]
    assert "_name_or_path" not in json.loads((there / "config.json").read_text())
    assert json.loads((there / "config.json").read_text())["name_or_path"] == "a/b"
    assert "nbqlora_merge.json" not in names(there), "its digests are of other files"


def test_a_page_of_the_users_own_is_published_as_it_is(adapter: Path, store: Store) -> None:
    said: list[str] = []
    (adapter / "README.md").write_text("---\nlicense: mit\n---\nmine\n")
    publish(adapter, "me/sun", token=GOOD_TOKEN, curve=b"png", say=said.append)
    assert (store.folder("me/sun") / "README.md").read_text().endswith("mine\n")
    assert said == ["README.md is your own, so it is published as it is"]
    (adapter / "README.md").write_text("---\nbase_model: /content/x\n---\n# Model Card for Model ID\n")
    publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert "/content" not in (store.folder("me/sun") / "README.md").read_text(), "PEFT's form is nobody's"
    (adapter / "README.md").write_text("---\n: [\n---\n")
    with pytest.raises(PublishError, match=r"^me/sun: Invalid metadata in README\.md. .*; correct the lines on"):
        publish(adapter, "me/sun", token=GOOD_TOKEN)


def test_a_public_repository_is_not_written_to_unasked(adapter: Path, store: Store) -> None:
    store.private["me/sun"] = False
    with pytest.raises(PublishError) as caught:
        publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert str(caught.value) == (
        "me/sun is there already and everybody can see it; write private=False to publish into it, or name another one"
    )
    assert not store.folder("me/sun").exists()
    publish(adapter, "me/sun", token=GOOD_TOKEN, private=False)
    said: list[str] = []
    publish(adapter, "me/moon", token=GOOD_TOKEN)
    publish(adapter, "me/moon", token=GOOD_TOKEN, private=False, say=said.append)
    assert said == ["me/moon is there already and stays private; its settings on the hub change that"]


def test_no_token_is_published_or_kept(adapter: Path, store: Store) -> None:
    said: list[str] = []
    publish(adapter, "me/sun", token=GOOD_TOKEN, say=said.append)
    sent = [body for _, _, _, body in store.requests] + [f.read_bytes() for f in store.root.rglob("*") if f.is_file()]
    assert not [b for b in sent if GOOD_TOKEN.encode() in b]
    assert {token for _, path, token, _ in store.requests if path.startswith("/lfs/")} == {""}
    assert not [f for f in adapter.rglob("*") if f.is_file() and GOOD_TOKEN.encode() in f.read_bytes()]
    who = writer("me/sun", GOOD_TOKEN)
    assert GOOD_TOKEN not in repr(who)
    with pytest.raises(TypeError, match="not written anywhere"):
        pickle.dumps(who)


def test_a_token_in_a_file_is_not_published(adapter: Path, store: Store) -> None:
    (adapter / "README.md").write_text("login('hf_" + "a1B2" * 9 + "')")
    with pytest.raises(PublishError) as caught:
        publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert str(caught.value) == "README.md holds what looks like a token of the hub; nothing was sent: remove it there"
    assert store.private == {}


def test_the_token_of_the_environment_is_used_and_named_by_its_place(
    adapter: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", GOOD_TOKEN)
    publish(adapter, "me/sun")
    monkeypatch.setenv("HF_TOKEN", READ_TOKEN)
    with pytest.raises(PublishError, match=r"^the variable HF_TOKEN may only read; make a token that may write"):
        publish(adapter, "me/sun")
