"""Whatever fails at whichever moment: the former state or the new one is there, whole, and the next try succeeds."""

from __future__ import annotations

import gc
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.hub.adapter import check_adapter
from nbqlora.hub.atomic import new_folder, remove_folder, remove_leftovers, save_json
from nbqlora.hub.checkpoint import Checkpoint, find_checkpoints, prune_checkpoints, write_checkpoint
from nbqlora.hub.manifest import adapter_damage
from nbqlora.hub.save import save_adapter
from tests import tiny
from tests.hub.faults import Case, Fault, content, every_fault

SLOW = pytest.mark.slow
FAULTS: tuple[Fault, ...] = ("kill", "once", "full", "gone")


@pytest.fixture(scope="module", autouse=True)
def quick_forks() -> Iterator[None]:
    """A fork has none of the threads that computed before, and need not copy what no collection touches."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose syncs take no time, where there is one: hundreds of saves follow each other."""
    memory = Path("/dev/shm")
    if not (memory.is_dir() and os.access(memory, os.W_OK)):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """Two adapters that differ in their weights and in their config."""
    return {
        "old": tiny.with_lora(tiny.make_model(num_hidden_layers=1), r=2),
        "new": tiny.with_lora(tiny.make_model(num_hidden_layers=1), r=4, seed=1),
    }


class FolderCase:
    """A folder of two files takes the place of another one."""

    def prepare(self, folder: Path) -> None:
        self.fill(folder, "old")

    def operate(self, folder: Path) -> None:
        self.fill(folder, "new")

    def fill(self, folder: Path, text: str) -> None:
        with new_folder(folder / "a", replace=True) as new:
            (new / "one").write_text(text)
            (new / "two").write_text(text)

    def check(self, folder: Path) -> str:
        one, two = ((folder / "a" / name).read_text() for name in ("one", "two"))
        assert one == two
        return one


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("swaps", [True, False], ids=["swap", "two renames"])
def test_a_folder_is_the_former_one_or_the_new_one(disk: Path, fault: Fault, swaps: bool) -> None:
    case = FolderCase()
    found = every_fault(
        # Between two renames nothing has the name: the next start, or a reader, puts the former one back.
        Case(
            prepare=case.prepare, operate=case.operate, check=case.check, swaps=swaps, always_named=swaps,
            errors=(OSError,),
        ),
        disk,
        fault,
    )  # fmt: skip
    assert found["calls"] >= 15 and found["old"] >= 5, found
    assert found["old"] + found["new"] == found["calls"]
    # Of a full disk, what only renames and removes goes on.
    assert found["new"] >= 3 or fault == "gone", found


def test_a_kill_between_two_renames_leaves_the_former_folder_aside(disk: Path) -> None:
    """The moment that the recovery is for does come: otherwise the test above would show nothing."""
    case, unnamed = FolderCase(), 0

    def look(folder: Path) -> None:
        nonlocal unnamed
        unnamed += not (folder / "a").exists()
        remove_leftovers(folder)

    every_fault(
        Case(prepare=case.prepare, operate=case.operate, check=case.check, begin=look, swaps=False, always_named=False),
        disk,
        "kill",
    )
    assert unnamed == 1


class AdapterCase:
    """An adapter is saved where one is, with notes of somebody else beside it."""

    def __init__(self, models: dict[str, Any]) -> None:
        self._models, self._tokenizer = models, tiny.make_tokenizer()
        self._known: dict[str, dict[str, bytes]] = {}

    def save(self, which: str, folder: Path) -> None:
        save_adapter(self._models[which], self._tokenizer, folder, "demo")

    def prepare(self, folder: Path) -> None:
        self.save("old", folder)
        (folder / "adapter" / "notes.txt").write_text("mine")
        (folder / "adapter" / "more").mkdir()
        (folder / "adapter" / "more" / "plot.png").write_bytes(b"mine too")
        self._known["old"] = content(folder / "adapter")

    def operate(self, folder: Path) -> None:
        self.save("new", folder)

    def check(self, folder: Path) -> str:
        check_adapter(folder / "adapter")
        assert adapter_damage(folder / "adapter", all_files=True) == ""
        there = content(folder / "adapter")
        assert (there["notes.txt"], there["more/plot.png"]) == (b"mine", b"mine too")
        if there == self._known["old"]:
            return "old"
        # Without a fault it looks so; the first look is at one that was not disturbed.
        assert there == self._known.setdefault("new", there)
        assert json.loads(there["adapter_config.json"])["r"] == 4
        return "new"


def every(swaps: bool, *faults: Fault, marks: Any = ()) -> list[Any]:
    how = "swap" if swaps else "two renames"
    return [pytest.param(swaps, fault, id=f"{fault}, {how}", marks=marks) for fault in faults]


@pytest.mark.parametrize(
    "swaps,fault", [*every(True, *FAULTS), *every(False, "once", "full", "gone"), *every(False, "kill", marks=SLOW)]
)
def test_an_adapter_is_the_former_one_or_the_new_one(models, disk: Path, swaps: bool, fault: Fault) -> None:
    case = AdapterCase(models)
    found = every_fault(
        Case(prepare=case.prepare, operate=case.operate, check=case.check, swaps=swaps, always_named=swaps),
        disk,
        fault,
    )
    assert found["calls"] > 45 and found["old"] > 20, found
    assert found["old"] + found["new"] == found["calls"]


@pytest.mark.parametrize("fault", ["once", "full"])
def test_the_first_adapter_is_there_or_not(models, disk: Path, fault: Fault) -> None:
    case = AdapterCase(models)

    def check(folder: Path) -> str:
        if not (folder / "adapter").exists():
            return "old"
        check_adapter(folder / "adapter")
        return "new"

    found = every_fault(
        Case(prepare=lambda folder: None, operate=lambda folder: case.save("new", folder), check=check), disk, fault
    )
    assert found["calls"] > 20 and found["old"] > 15, found


GROUPS = {"optimizer": {"a:step": torch.tensor(3.0), "a:exp_avg": torch.arange(64.0)}, "rng": {"torch": torch.ones(9)}}


def write(models: dict[str, Any], root: Path, step: int, which: str) -> Checkpoint:
    settings: dict[str, Any] = {"base_name": "demo", "total_steps": 9, "identity": {"run": 1}, "groups": GROUPS}
    return write_checkpoint(root, model=models[which], step=step, state={"which": which}, **settings)


def the_furthest(root: Path) -> str:
    """The state of the furthest checkpoint, all of them being whole."""
    found, unreadable = find_checkpoints(root)
    assert unreadable == [] and [c.damage() for c in found] == [""] * len(found)
    state: str = found[0].state["which"]
    assert json.loads((found[0].folder / "adapter_config.json").read_text())["r"] == {"old": 2, "new": 4}[state]
    return state


@pytest.mark.parametrize("fault", FAULTS)
def test_a_checkpoint_is_there_or_the_one_before_it(models, disk: Path, fault: Fault) -> None:
    def operate(root: Path) -> None:
        write(models, root, 2, "new")
        prune_checkpoints(root, keep=1, is_own=lambda c: True)

    case = Case(
        prepare=lambda root: write(models, root, 1, "old"),
        operate=operate,
        check=the_furthest,
        errors=(OSError,),  # of pruning, which a run passes over with a note
    )
    found = every_fault(case, disk, fault)
    assert found["calls"] > 30 and found["old"] >= 15 and found["old"] + found["new"] == found["calls"], found
    # Behind the rename everything is there, whatever fails.
    assert found["new"] >= 5


@pytest.mark.parametrize("fault", ["once", "full"])
def test_the_same_step_is_the_former_one_until_the_new_one_is_whole(models, disk: Path, fault: Fault) -> None:
    case = Case(
        prepare=lambda root: write(models, root, 1, "old"),
        operate=lambda root: write(models, root, 1, "new"),
        check=the_furthest,
    )
    found = every_fault(case, disk, fault)
    assert found["old"] >= 15 and found["old"] + found["new"] == found["calls"], found


@pytest.mark.parametrize("fault", ["kill", "once", "gone"])
def test_a_removed_folder_is_whole_or_not_there(disk: Path, fault: Fault) -> None:
    def prepare(folder: Path) -> None:
        (folder / "a").mkdir()
        (folder / "a" / "one").write_text("1")
        (folder / "a" / "two").write_text("2")

    def check(folder: Path) -> str:
        assert not (folder / "a").exists() or content(folder / "a") == {"one": b"1", "two": b"2"}
        return "old" if (folder / "a").exists() else "new"

    def operate(folder: Path) -> None:
        if (folder / "a").exists():
            remove_folder(folder / "a")

    found = every_fault(Case(prepare=prepare, operate=operate, check=check, errors=(OSError,)), disk, fault)
    assert found["old"] == 1 and found["new"] >= 3, found


@pytest.mark.parametrize("fault", FAULTS)
def test_json_is_the_former_or_the_new(disk: Path, fault: Fault) -> None:
    def check(folder: Path) -> str:
        told: str = json.loads((folder / "x.json").read_text())["which"]
        return told

    case = Case(
        prepare=lambda folder: save_json({"which": "old"}, folder / "x.json"),
        operate=lambda folder: save_json({"which": "new"}, folder / "x.json"),
        check=check,
        errors=(OSError,),
    )
    found = every_fault(case, disk, fault)
    assert found["calls"] >= 6 and found["old"] >= 2, found
