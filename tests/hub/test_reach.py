"""What the hub says, asked through the real client against a stand-in server; in seconds, without a word on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbqlora.hub.reach import Answer, answer_of
from tests.hub.hub_server import BAD_TOKEN, FINE_GRAINED, GOOD_TOKEN, NARROW_TOKEN, closed_address, hub_server

ASK = """
import json, sys
from dataclasses import asdict
from nbqlora.hub.reach import ask, ask_hub
kinds = {name: "dataset" if "data-" in name else "model" for name in sys.argv[1:]}
print(json.dumps([asdict(ask(name, kind=kind) if name else ask_hub()) for name, kind in kinds.items()]))
"""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with hub_server() as address:
        yield address


def asked(address: str, home: Path, *names: str, **environ: str) -> list[Answer]:
    """The answers for ``names`` ("" is the hub itself) in a process that has that hub; nothing is said beside them."""
    clean = {
        k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_", "http", "HTTP"))
    }
    env = {**clean, "HF_ENDPOINT": address, "HF_HOME": str(home), **environ}
    done = subprocess.run([sys.executable, "-c", ASK, *names], capture_output=True, text=True, env=env, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return [Answer(**answer) for answer in json.loads(done.stdout)]


def kinds(answers: list[Answer]) -> list[str]:
    return [a.kind for a in answers]


def test_each_answer_of_the_hub_is_told_apart(hub: str, tmp_path: Path) -> None:
    names = {
        "": "ok",
        "org/open": "ok",
        "org/data-open": "ok",
        "org/gated": "gated",
        "org/missing": "missing",
        "org/bare401": "missing",
        "org/bare404": "missing",
        "org/gguf": "no_file",
        "org/busy": "busy",
        "org/portal": "no_hub",
        "a/b/c": "bad_name",
    }
    answers = asked(hub, tmp_path, *names)
    assert dict(zip(names, kinds(answers), strict=True)) == names
    assert answers[list(names).index("org/busy")].detail == "it answers 503"


def test_a_token_changes_what_the_hub_says(hub: str, tmp_path: Path) -> None:
    names = ("", "org/open", "org/gated")
    good = asked(hub, tmp_path, *names, HF_TOKEN=GOOD_TOKEN)
    assert kinds(good) == ["ok", "ok", "gated"]
    assert kinds(asked(hub, tmp_path, *names, HF_TOKEN=BAD_TOKEN)) == ["refused_token"] * 3
    assert asked(hub, tmp_path, "org/gated", HF_TOKEN=NARROW_TOKEN) == [Answer(kind="gated", detail=FINE_GRAINED)]


def test_the_login_file_counts_as_a_token_unless_it_is_switched_off(hub: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(BAD_TOKEN)
    assert kinds(asked(hub, tmp_path, "")) == ["refused_token"]
    assert kinds(asked(hub, tmp_path, "", HF_HUB_DISABLE_IMPLICIT_TOKEN="1")) == ["ok"]


def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(hub: str, tmp_path: Path) -> None:
    (answer,) = asked(hub, tmp_path, "", HF_TOKEN="hf_sécret")
    assert answer == Answer(kind="refused_token", detail="it holds characters that no token has")


@pytest.mark.parametrize(
    ("address", "detail"),
    [
        ("closed", "it refuses the connection"),
        ("http://no-such-host.invalid", "its name is not known"),
        ("tls", "no TLS connection comes about (a proxy in between?)"),
        ("localhost:1", "HF_ENDPOINT must begin with https:// or http://"),
    ],
)
def test_why_the_hub_cannot_be_reached_is_said_within_seconds(
    hub: str, tmp_path: Path, address: str, detail: str
) -> None:
    address = {"closed": closed_address(), "tls": hub.replace("http:", "https:")}.get(address, address)
    begun = time.monotonic()
    assert asked(address, tmp_path, "org/open") == [Answer(kind="unreachable", detail=detail)]
    assert time.monotonic() - begun < 5


def test_a_hub_that_hangs_is_given_up(hub: str, tmp_path: Path) -> None:
    begun = time.monotonic()
    (answer,) = asked(hub, tmp_path, "org/hangs", HF_HUB_ETAG_TIMEOUT="1")
    assert answer == Answer(kind="unreachable", detail="no answer in 1 s, HF_HUB_ETAG_TIMEOUT changes that")
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_variable_that_forbids_the_network_is_named_and_obeyed(tmp_path: Path, variable: str) -> None:
    answers = asked(closed_address(), tmp_path, "", "org/open", **{variable: "1"})
    assert answers == [Answer(kind="offline", detail=f"{variable} = 1 keeps the libraries off it")] * 2


def test_a_certificate_is_not_trusted() -> None:
    import ssl

    import huggingface_hub.utils._http as client

    httpx = getattr(client, "httpx2", None) or client.httpx
    error = httpx.ConnectError("[SSL] verify failed")
    error.__cause__ = ssl.SSLCertVerificationError("verify failed")
    assert answer_of(error) == Answer(
        kind="unreachable", detail="its certificate is not trusted here (a proxy in between?)"
    )


def test_an_error_that_was_handled_says_nothing_about_the_next() -> None:
    try:
        try:
            raise ConnectionRefusedError("an optional file")
        except ConnectionRefusedError:
            raise KeyError("model_type")  # noqa: B904
    except KeyError as error:
        assert answer_of(error) is None
