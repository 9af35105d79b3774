"""Real disks that are full: whatever their size, a save succeeds or says so, and the former state is whole."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import OutOfDiskError
from nbqlora.hub import checkpoint as checkpoints
from nbqlora.hub import save
from nbqlora.hub.checkpoint import find_checkpoints, write_checkpoint
from nbqlora.hub.manifest import adapter_damage
from nbqlora.hub.save import save_adapter
from tests import tiny
from tests.hub.faults import content

GROUPS = {"optimizer": {"a": torch.arange(30_000.0), "b": torch.arange(30_000.0)}}
Disk = Callable[[int], Path]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {which: tiny.with_lora(tiny.make_model(num_hidden_layers=1), r=8, seed=i) for i, which in enumerate("ab")}


@pytest.fixture(autouse=True)
def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """The room that is asked for beforehand is not all: others write to the disk too."""
    monkeypatch.setattr(checkpoints, "ROOM_BYTES", -(1 << 40))
    monkeypatch.setattr(save, "ROOM_BYTES", -(1 << 40))


def adapter(model: Any, folder: Path) -> None:
    save_adapter(model, tiny.make_tokenizer(), folder, "demo")


def checkpoint(model: Any, folder: Path) -> None:
    state = {"weights": float(next(p for p in model.parameters() if p.requires_grad).detach().sum())}
    settings: dict[str, Any] = {"base_name": "demo", "total_steps": 9, "identity": {}, "state": state}
    write_checkpoint(folder / "checkpoints", model=model, step=3, groups=GROUPS, **settings)


def whole(folder: Path) -> bool:
    found, unreadable = find_checkpoints(folder / "checkpoints")
    damaged = [c.damage() for c in found if c.damage()]
    return not unreadable and not damaged and not ((folder / "adapter").exists() and adapter_damage(folder / "adapter"))


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


@pytest.mark.parametrize("write", [adapter, checkpoint])
def test_a_full_disk_leaves_the_former_state(models: dict[str, Any], small_disk: Disk, write: Any) -> None:
    disk = small_disk(4 << 20)
    run = disk / "run"
    write(models["a"], run)
    before, needed = content(run), sum(len(b) for b in content(run).values())
    ballast = (disk / "ballast").open("wb", buffering=0)
    outcomes: list[bool] = []
    ballast.write(bytes(free_bytes(disk)))
    for room in range(0, 2 * needed, 8 << 10):
        ballast.truncate(ballast.seek(0, os.SEEK_END) - (room - free_bytes(disk)))
        try:
            write(models["b"], run)
        except OutOfDiskError as error:
            outcomes.append(False)
            assert "No space left on device; free some room" in str(error)
            assert content(run) == before
        else:
            outcomes.append(True)
            assert content(run) != before and whole(run)
            break
        assert whole(run) and not [p for p in disk.rglob("*") if p.name.startswith(".saving-")]
    assert outcomes.count(False) > 5 and outcomes[-1], outcomes
    ballast.close()


@contextmanager
def files_no_longer_than(n_bytes: int) -> Iterator[None]:
    """What a user without rights can have in place of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [adapter, checkpoint])
def test_a_file_that_may_not_grow_leaves_the_former_state(models: dict[str, Any], tmp_path: Path, write: Any) -> None:
    write(models["a"], tmp_path)
    before = content(tmp_path)
    longest = max(len(b) for b in before.values())
    for n_bytes in (0, 1, 100, 1000, 5000, longest // 2, longest - 1):
        with pytest.raises(OutOfDiskError, match="File too large; free some room"), files_no_longer_than(n_bytes):
            write(models["b"], tmp_path)
        assert content(tmp_path) == before and whole(tmp_path)
        assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".saving-")]
    with files_no_longer_than(longest + 4096):
        write(models["b"], tmp_path)
    assert content(tmp_path) != before and whole(tmp_path)
