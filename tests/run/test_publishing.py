"""A run's adapter on a hub: the page tells what it learned from and how, in figures, and nothing of the rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from nbqlora.core.errors import ConfigError
from nbqlora.run.publishing import publish_run
from tests.hub.hub_server import GOOD_TOKEN, point_to
from tests.hub.upload_server import Store, upload_server
from tests.run.resuming import ROWS

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with upload_server(tmp_path / "hub") as (address, held):
        point_to(address, tmp_path / "hf", monkeypatch)
        yield held


def test_a_run_is_published_with_its_figures(whole: Any, model: Path, store: Store) -> None:
    said: list[str] = []
    publish_run(whole.report, whole.adapter_dir, "me/sun", token=GOOD_TOKEN, say=said.append)
    there = store.folder("me/sun")
    assert (there / "nbqlora_loss.png").read_bytes().startswith(b"\x89PNG")
    assert len((there / "nbqlora_loss.png").read_bytes()) < 100_000
    page, report = (there / "README.md").read_text(), whole.report
    data = report.plan.data
    for line in (
        f"| rows | {data.n_rows}, as messages |",
        f"| tokens | {data.n_tokens}, {data.n_supervised_tokens} of them learned |",
        "| adapter | LoRA of rank 4, alpha 16, on ",
        "| steps | 9 of 9 |",
        f"| loss | {report.steps[0].loss:.3f} -> {report.steps[-1].loss:.3f} |",
        "| ended | done |",
        f"peft {report.versions['peft']}",
        "![loss and memory over the steps](nbqlora_loss.png)",
    ):
        assert line in page, line
    assert said == [
        f"adapter_config.json named {model}: published as {model.name}; base_model names where others find it"
    ]


def test_a_run_publishes_its_adapter_and_what_was_merged_from_it(
    whole: Any, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = whole.push_to_hub("me/adapter", token=GOOD_TOKEN, base_model="them/sun-base")
    assert address.endswith("/me/adapter")
    assert 'base_model: "them/sun-base"' in (store.folder("me/adapter") / "README.md").read_text()
    whole.merge(tmp_path / "merged", check=False)
    whole.push_to_hub("me/merged", folder=tmp_path / "merged", kind="merged", token=GOOD_TOKEN)
    assert (store.folder("me/merged") / "model.safetensors").is_file()
    assert GOOD_TOKEN not in capsys.readouterr().out


def test_nothing_of_the_rows_and_of_this_machine_is_published(whole: Any, store: Store) -> None:
    publish_run(whole.report, whole.adapter_dir, "me/sun", token=GOOD_TOKEN)
    texts = {row["messages"][i]["content"] for row in ROWS for i in (0, 1)}
    long = [text for text in texts if " " in text]
    for file in store.folder("me/sun").iterdir():
        content = file.read_bytes()
        assert not [text for text in long if text.encode() in content], file.name
        assert b"/tmp/" not in content and str(Path.cwd()).encode() not in content, file.name
        assert GOOD_TOKEN.encode() not in content
    assert len(long) > 5
    kept = [json.dumps(whole.report.as_dict()), str(whole), repr(whole.events)]
    assert not [text for text in kept if GOOD_TOKEN in text]


def test_a_kind_that_there_is_not_is_a_problem_of_the_call(whole: Any) -> None:
    with pytest.raises(ConfigError, match=r"1 problem in push_to_hub\n  kind  'lora' is none of adapter, merged, gguf"):
        publish_run(whole.report, whole.adapter_dir, "me/sun", kind="lora")


def test_a_run_without_a_step_has_no_curve(whole: Any, store: Store) -> None:
    publish_run(replace(whole.report, events=()), whole.adapter_dir, "me/sun", token=GOOD_TOKEN)
    assert "nbqlora_loss.png" not in {p.name for p in store.folder("me/sun").iterdir()}
    assert "nbqlora_loss" not in (store.folder("me/sun") / "README.md").read_text()
