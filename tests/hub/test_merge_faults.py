"""A merge that is disturbed at each of its calls: the former merge or the new one, whole, and the next try succeeds."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.hub.atomic import remove_leftovers
from nbqlora.hub.merge import work_folder
from nbqlora.hub.merge_journal import MANIFEST, damage
from nbqlora.hub.save import sha256
from tests.hub.faults import Case, Fault, every_fault
from tests.hub.merging import merge_tiny, save_base, save_lora

FAULTS: tuple[Fault, ...] = ("kill", "once", "full", "gone")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """A fork has none of the threads that computed before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sources")
    base = save_base(folder / "base", "llama", num_hidden_layers=1)
    return {"base": base, **{name: save_lora(base, folder / name, seed=i) for i, name in enumerate(("old", "new"))}}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A folder whose syncs take no time, where there is one."""
    memory = Path("/dev/shm")
    if not memory.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


class MergeCase:
    """Another adapter is merged where a merge is."""

    def __init__(self, sources: dict[str, Any]) -> None:
        self._sources = sources
        self._known: dict[str, dict[str, str]] = {}

    def merge(self, which: str, folder: Path) -> None:
        target = folder / "merged"
        merge_tiny(self._sources["base"], [self._sources[which]], target, max_shard_size="100KB", check=False)
        self._known.setdefault(which, self.digests(target))

    def digests(self, target: Path) -> dict[str, str]:
        return {f.name: sha256(f) for f in target.iterdir() if f.name != MANIFEST}

    def prepare(self, folder: Path) -> None:
        self.merge("old", folder)

    def operate(self, folder: Path) -> None:
        self.merge("new", folder)

    def check(self, folder: Path) -> str:
        target = folder / "merged"
        assert damage(target) == ""
        return next(name for name, files in self._known.items() if files == self.digests(target))

    def begin(self, folder: Path) -> None:
        """What the next merge removes first; what it goes on with stays."""
        remove_leftovers(folder)
        work = work_folder(folder / "merged")
        if work.exists():
            remove_leftovers(work)


@pytest.mark.parametrize("swaps", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_merge_in_the_place_of_another(sources, disk: Path, fault: Fault, swaps: bool) -> None:
    case = MergeCase(sources)
    found = every_fault(
        Case(
            prepare=case.prepare, operate=case.operate, check=case.check, begin=case.begin, swaps=swaps,
            always_named=swaps,
        ),
        disk,
        fault,
    )  # fmt: skip
    assert found["calls"] > 30 and found["old"] > 20, found
    assert found["old"] + found["new"] == found["calls"]


def test_a_merge_that_was_left_alone_leaves_nothing_else(sources, tmp_path: Path) -> None:
    case = MergeCase(sources)
    case.prepare(tmp_path)
    case.operate(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["merged"]
    shutil.rmtree(tmp_path / "merged")
