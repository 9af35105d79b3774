"""What a hub does not take is said within seconds, before anything is sent, without a token or a signed address."""

from __future__ import annotations

import pickle
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from nbqlora.core.errors import ModelError, PublishError
from nbqlora.hub.publish import publish
from tests.hub.hub_server import BAD_TOKEN, GOOD_TOKEN, closed_address
from tests.hub.upload_server import FINE_TOKEN, NO_RIGHTS, READ_TOKEN, Store

pytest_plugins = ["tests.hub.uploads"]
TOKENS = {GOOD_TOKEN, READ_TOKEN, FINE_TOKEN, BAD_TOKEN}
SETTINGS = "https://huggingface.co/settings/tokens"
GIVEN = "the token that was given"
# What is asked for, with which token, and what is said.
REFUSED: dict[str, tuple[str, str, str]] = {
    "no token": (
        "me/sun", "",
        f"publishing me/sun needs a token that may write; set HF_TOKEN, or run huggingface_hub.login(); {SETTINGS} "
        "makes one",
    ),
    "wrong token": ("me/sun", BAD_TOKEN, f"the hub refuses {GIVEN}; make a new one: {SETTINGS}"),
    "read only": ("me/sun", READ_TOKEN, f"{GIVEN} may only read; make a token that may write: {SETTINGS}"),
    "narrow": (
        "me/sun", FINE_TOKEN, f"{GIVEN} may not write to me/sun: {NO_RIGHTS}; make a token that may: {SETTINGS}",
    ),
    "another's": (
        "google/sun", GOOD_TOKEN,
        'google is not this token\'s to publish under: it is the token of me and club; write "me/sun"',
    ),
    "no name": (
        "me/sun/adapter", GOOD_TOKEN,
        "'me/sun/adapter' is no name that a hub takes (owner/name); letters, digits, -, _ and . make one, at most 96 "
        "in all",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("repo_id", "token", "said"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_said_before_anything_is_sent(
    adapter: Path, store: Store, repo_id: str, token: str, said: str
) -> None:
    with pytest.raises(PublishError) as caught:
        publish(adapter, repo_id, token=token or None)
    assert str(caught.value) == said
    assert not [r for r in store.requests if "preupload" in r[1] or "lfs" in r[1]]
    check_hidden(caught.value, store)


def check_hidden(error: BaseException, store: Store) -> None:
    """No token, and no signed address, in an error, however it is shown."""
    shown = "".join(traceback.format_exception(error)) + repr(error) + str(pickle.dumps(error))
    assert not [secret for secret in (*TOKENS, "secretSignature") if secret in shown]


@pytest.mark.parametrize(
    ("part", "status", "said"),
    [
        ("whoami", 503, r"^http://127.* cannot take me/sun now: it answers 503; try again in a minute$"),
        ("repos/create", 503, r"^http://127.* cannot take me/sun now: it answers 503; try again in a minute$"),
        ("commit", 403, r"^the token that was given may not write to me/sun: as the test wants it; make a token"),
        ("signature=", 403, r"^the token that was given may not write to me/sun: as the test wants it; make a token"),
        ("signature=", 413, r"^http://127.* does not take me/sun: it answers 413$"),
    ],
)
def test_what_is_refused_on_the_way_is_one_line(adapter: Path, store: Store, part: str, status: int, said: str) -> None:
    store.refuse[part] = status
    with pytest.raises(PublishError, match=said) as caught:
        publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert "\n" not in str(caught.value) and not store.folder("me/sun").exists()
    check_hidden(caught.value, store)


def test_without_a_network_it_is_said_within_seconds(
    adapter: Path, use: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(closed_address())
    begun = time.monotonic()
    with pytest.raises(PublishError, match=r"^me/sun cannot be published: http://127.* cannot be reached \(it refuses"):
        publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert time.monotonic() - begun < 10
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        PublishError, match=r"cannot be published: HF_HUB_OFFLINE = 1 keeps the libraries off it; unset"
    ):
        publish(adapter, "me/sun", token=GOOD_TOKEN)


def test_a_folder_without_such_files_is_refused_before_the_hub_is_asked(
    adapter: Path, merged: Path, tmp_path: Path, store: Store
) -> None:
    (tmp_path / "text.gguf").write_text("nothing")
    cases: list[tuple[Path, Any, str]] = [
        (tmp_path / "no", "adapter", f"no such folder: {tmp_path}/no"),
        (merged, "gguf", f"{merged} holds no GGUF file; export one into it first"),
        (tmp_path / "text.gguf", "gguf", f"{tmp_path}/text.gguf holds no GGUF file; export one into it first"),
        (adapter, "merged", f"{adapter} holds no merged model: config.json and all its weights; merge into it first"),
    ]
    for folder, kind, said in cases:
        with pytest.raises(PublishError) as caught:
            publish(folder, "me/sun", kind=kind, token=GOOD_TOKEN)
        assert str(caught.value) == said
    (adapter / "adapter_model.safetensors").write_bytes(b"cut")
    with pytest.raises(ModelError, match=r"cannot be used: adapter_model\.safetensors has 3 of"):
        publish(adapter, "me/sun", token=GOOD_TOKEN)
    assert store.requests == []
