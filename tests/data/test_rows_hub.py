"""Data sets of the hub: what is read, and what is said when the hub gives nothing."""

import os
from pathlib import Path
from typing import Any

import pytest

from nbqlora.core.errors import DataError
from nbqlora.data.rows import no_progress_bars, read_rows

ROWS = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def said(source: Any, split: str = "train") -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source, split=split)
    return str(caught.value)


def rows_of(source: Any, split: str = "train") -> list[Any]:
    return [row for _, row in read_rows(source, split=split)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The hub, as far as ``datasets`` shows it: data sets by name, an exception instead of one."""
    datasets = pytest.importorskip("datasets")
    known: dict[str, Any] = {}

    def load(name: str, split: str) -> Any:
        assert datasets.are_progress_bars_disabled()
        if isinstance(known[name], Exception):
            raise known[name]
        return known[name][split]

    def names(name: str) -> list[str]:
        if isinstance(known[name], Exception):
            raise known[name]
        return list(known[name])

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_split_names", names)
    return known


@pytest.mark.parametrize("name", ["owner/rows", "rows", "teknium/OpenHermes-2.5", "owner/v1.0"])
def test_a_data_set_of_the_hub(name: str, hub: dict[str, Any]) -> None:
    import datasets

    hub[name] = {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:1])}
    assert (rows_of(name), read_rows(name).source) == (ROWS, f"{name} (train)")
    assert (rows_of(name, split="eval"), read_rows(name, split="eval").source) == (
        ROWS[:1], f"{name} (test)",
    )  # fmt: skip
    assert not datasets.are_progress_bars_disabled()
    hub[name] = {"train": datasets.Dataset.from_list(ROWS)}
    assert said(name, "eval") == f'{name} has no split "eval"; it has train; give the rows of one of them'


def test_what_the_hub_says(hub: dict[str, Any]) -> None:
    import datasets

    gave = "is neither a file here nor a data set that the hub gave:"
    hub["a/b"] = ConnectionError("Couldn't reach 'a/b' on the Hub\nmore")
    assert said("a/b") == f"a/b {gave} Couldn't reach 'a/b' on the Hub; is there a network?"
    assert said("a/b", "eval") == f"a/b {gave} Couldn't reach 'a/b' on the Hub; is there a network?"
    hub["rows"] = datasets.exceptions.DatasetNotFoundError("Dataset 'rows' doesn't exist")
    assert said("rows") == f"rows {gave} Dataset 'rows' doesn't exist; for an object of the notebook write \"$rows\""
    for error in (ValueError(), datasets.exceptions.DatasetGenerationError("broken"), RuntimeError("scripts")):
        hub["a/b"] = error
        assert said("a/b").startswith(f"a/b {gave} {str(error) or 'ValueError'}; ")
    assert not datasets.are_progress_bars_disabled()


def test_the_real_hub_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", os.getcwd())
    message = said("nobody-here/no-such-data-set")
    assert message.startswith(
        "nobody-here/no-such-data-set is neither a file here nor a data set that the hub gave: Couldn't reach"
    )
    assert message.endswith("is there a network?")
    assert "\n" not in message


def test_progress_bars_are_left_as_the_user_had_them() -> None:
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    try:
        with no_progress_bars():
            pass
        assert datasets.are_progress_bars_disabled()
    finally:
        datasets.enable_progress_bars()
