"""What would end a run is an error before anything is downloaded; what might, is a note."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import nbqlora
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, DataError, DeviceError, ModelError, OutOfDiskError
from nbqlora.hub import access
from nbqlora.memory.cards import Driver, Machine
from nbqlora.memory.nvml import Card
from nbqlora.run.mounts import SLOW_FOLDERS
from nbqlora.run.preflight import check_card, check_download, check_room_for, preflight, where_to_save
from tests.hub.hub_server import closed_address, hub_server, point_to
from tests.mounts import mounted
from tests.planner.shapes import MODELS

GIB = 1 << 30
ARCHES = ["sm_75", "sm_80", "sm_86", "sm_90"]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with hub_server() as address:
        point_to(address, tmp_path / "hf", monkeypatch)
        yield address


def config(**options: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "demo", "data": "demo", **options})


def machine(name: str = "Tesla T4", capability: tuple[int, int] = (7, 5)) -> Machine:
    card = Card(uuid="", name=name, total_bytes=GIB, free_bytes=GIB, n_cards=1, own_bytes=0, others_bytes=0)
    driver = Driver(version="550.54.15", cuda=(12, 4), names=(name,), capability=capability)
    return Machine(card=card, why="", driver=driver, has_driver=True)


@pytest.fixture
def old_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "site/torchao-0.10.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torchao\nVersion: 0.10.0\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))


def test_all_is_well_here(tmp_path: Path) -> None:
    assert preflight(config(), tmp_path / "runs/run1") == ()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "options",
    [{"load_in_4bit": False}, {"target_modules": ("q_proj", "lm_head")}, {"target_modules": ("embed_tokens",)}],
)
def test_torchao_is_an_error_only_for_the_runs_that_it_ends(
    old_torchao: None, tmp_path: Path, options: dict[str, Any]
) -> None:
    assert preflight(config(), tmp_path) == ()
    with pytest.raises(ModelError, match=r"^torchao 0\.10\.0 is older than 0\.16.*; pip uninstall -y torchao"):
        preflight(config(**options), tmp_path)


def test_a_folder_that_cannot_be_written_is_a_problem_of_the_cell(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as caught:
        preflight(config(), tmp_path / "file/run1")
    (problem,) = caught.value.problems
    assert (problem.key, problem.hint) == ("output_dir", "name another folder")
    assert problem.message == f"{tmp_path}/file/run1 cannot be made: {tmp_path}/file is a file"


def test_a_p100_is_refused_before_cuda_is_started() -> None:
    check_card(machine(), ARCHES, "", load_in_4bit=True)
    with pytest.raises(DeviceError, match=r"on Kaggle choose Settings > Accelerator > GPU T4 x2"):
        check_card(machine("Tesla P100-PCIE-16GB", (6, 0)), ARCHES, "", load_in_4bit=True)


def test_a_bitsandbytes_without_the_cards_library_is_refused_for_4_bits_only() -> None:
    check_card(machine(), ARCHES, "12.8", load_in_4bit=True)
    check_card(machine(), ARCHES, "9.2", load_in_4bit=False)
    with pytest.raises(DeviceError, match=r"has no library for CUDA 9\.2.*; pip install -U bitsandbytes, or write"):
        check_card(machine(), ARCHES, "9.2", load_in_4bit=True)


def test_a_data_set_that_the_hub_lacks_is_said_at_once(hub: str, tmp_path: Path) -> None:
    assert preflight(config(data="org/open", eval_data="org/gguf"), tmp_path) == ()
    with pytest.raises(DataError, match=r"^the hub has no data set org/missing"):
        preflight(config(eval_data="org/missing"), tmp_path)


def test_a_forgotten_dollar_is_guessed_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    point_to(closed_address(), tmp_path / "hf", monkeypatch)
    with pytest.raises(DataError, match=r'cannot be reached.*; for an object of the notebook write "\$my_rows"$'):
        preflight(config(data="my_rows"), tmp_path)


@pytest.mark.parametrize("data", ["demo", "rows.jsonl", "folder/rows.jsonl", "here/rows", [{"messages": []}]])
def test_what_is_no_hub_data_set_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    point_to(closed_address(), tmp_path / "hf", monkeypatch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here/rows").mkdir(parents=True)
    assert preflight(config(data=data), tmp_path) == ()


def test_a_library_changed_by_pip_is_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("trl")
    module.__version__ = "0.9.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", module)
    (note,) = preflight(config(), tmp_path)
    assert note.startswith("trl 0.9.0 is loaded, ") and "restart the kernel once" in note


def test_a_download_without_room_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access, "disk_free_bytes", lambda folder: 5 * GIB)
    model = next(iter(MODELS.values()))
    check_download(replace(model, download_bytes=4 * GIB))
    with pytest.raises(
        OutOfDiskError, match=r"16\.0 GiB to download, and the disk of .* has 5\.0 GiB free; set HF_HOME"
    ):
        check_download(replace(model, download_bytes=16 * GIB))


def test_a_disk_without_room_for_the_checkpoints_is_an_error_that_names_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = MODELS["1B"]
    with mounted(tmp_path / "small", "300m") as small, pytest.raises(OutOfDiskError) as caught:
        where_to_save(config(model="m"), model, small / "run1", {})
    assert re.fullmatch(
        rf"this run writes up to 0\.48 GiB \(adapter .*\), and {small}/run1 has 0\.29 GiB free; there is room in "
        rf"{tmp_path} \(.* free\).*: name a folder there as output_dir",
        str(caught.value),
    )
    found = where_to_save(config(model="m"), model, tmp_path / "run1", {})
    assert (found.work_dir, found.notes) == (tmp_path / "run1", ())
    assert found.rooms[0].path == str(tmp_path / "run1")


def test_nothing_is_downloaded_or_planned_for_a_run_without_room(
    tiny_folder: Path, tiny_rows: list[Any], tmp_path: Path
) -> None:
    with mounted(tmp_path / "small", "8m") as small, pytest.raises(OutOfDiskError, match=r"^this run writes up to"):
        nbqlora.plan(model=str(tiny_folder), data=tiny_rows, output_dir=str(small / "run1"))


def test_a_slow_folder_gets_a_folder_to_work_in_and_a_note(tmp_path: Path) -> None:
    found = where_to_save(config(model="m"), MODELS["1B"], tmp_path / "far/run1", {SLOW_FOLDERS: str(tmp_path / "far")})
    assert found.work_dir != tmp_path / "far/run1" and found.work_dir.name.startswith("run1-")
    assert found.notes == (
        f"{tmp_path}/far/run1 is no disk of this machine: written to {found.work_dir}, then copied there",
    )


def test_room_for_something_large_is_checked_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_room_for("the merged model", GIB // 4, tmp_path / "merged", {})
    with mounted(tmp_path / "small", "8m") as small, pytest.raises(OutOfDiskError) as caught:
        check_room_for("the merged model", GIB // 4, small / "merged", {})
    said = f"the merged model needs 0.25 GiB, and {small}/merged has 8 MiB free; there is room in {tmp_path} ("
    assert str(caught.value).startswith(said) and str(caught.value).endswith("name a folder there")
