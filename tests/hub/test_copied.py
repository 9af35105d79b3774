"""A copy has its name only when it is what was written; on file systems of their own that fill up or go away."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nbqlora.hub import copied
from nbqlora.hub.copied import DamagedCopyError, copy_checked, copy_file
from tests.mounts import mount, mounted, unmount

NAMES = ("README.md", "adapter_model.safetensors", "inner/a.bin", "optimizer.safetensors", "state.json")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "local/step-000001", b"new ")


@pytest.fixture
def far(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "far", "4m") as folder:
        yield folder


def fill(folder: Path, text: bytes, n: int = 1000) -> Path:
    for name in NAMES:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text * n + name.encode())
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def after(n: int, do: Callable[[Path], Any]) -> Any:
    """A copy of a file as usual, and behind the n-th one something more."""
    seen: list[Path] = []

    def copy(source: Path, target: Path, moved: Callable[[int], None]) -> str:
        digest = copy_file(source, target, moved)
        seen.append(target)
        if len(seen) == n:
            do(target)
        return digest

    return copy


def test_a_folder_and_a_file_are_copied_whole(source: Path, far: Path) -> None:
    moved: list[int] = []
    n_bytes = copy_checked(source, far / "run/checkpoints/step-000001", moved=moved.append)
    assert content(far / "run/checkpoints/step-000001") == content(source)
    assert n_bytes == sum(map(len, content(source).values())) == sum(moved) // 2, "written, and read back"
    copy_checked(source / "state.json", far / "run/run.json")
    assert (far / "run/run.json").read_bytes() == (source / "state.json").read_bytes()
    assert sorted(p.name for p in (far / "run").iterdir()) == ["checkpoints", "run.json"]


def test_large_files_go_in_pieces(tmp_path: Path, far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copied, "PIECE_BYTES", 1000)
    monkeypatch.setattr(copied, "SYNC_BYTES", 2500)
    (tmp_path / "file").write_bytes(os.urandom(10_001))
    moved: list[int] = []
    copy_checked(tmp_path / "file", far / "file", moved=moved.append)
    assert (far / "file").read_bytes() == (tmp_path / "file").read_bytes() and len(moved) == 22


def change_byte(file: Path) -> None:
    changed = bytearray(file.read_bytes())
    changed[17] ^= 1
    file.write_bytes(changed)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (lambda f: os.truncate(f, 100), r"^it holds 100 of \d+ bytes of a.bin$"),
    "empty": (lambda f: os.truncate(f, 0), r"^it holds 0 of \d+ bytes of a.bin$"),
    "changed": (change_byte, r"^a.bin is not there as it was written$"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_copy_that_is_damaged_in_silence_gets_no_name(
    source: Path, far: Path, damage: Callable[[Path], Any], said: str
) -> None:
    fill(far / "step-000001", b"old ")
    before = content(far)
    with pytest.raises(DamagedCopyError, match=said):
        copy_checked(source, far / "step-000001", copy=after(2, damage))
    assert content(far) == before
    copy_checked(source, far / "step-000001")
    assert content(far / "step-000001") == content(source)


def test_a_disk_without_room_is_found_before_a_byte_is_written(tmp_path: Path, far: Path) -> None:
    big = fill(tmp_path / "big", b"new ", n=300_000)
    copies: list[Path] = []
    with pytest.raises(OSError, match="No space left on device"):
        copy_checked(big, far / "step", copy=after(1, copies.append))
    assert copies == [] and list(far.iterdir()) == []


def test_a_disk_that_fills_up_meanwhile_keeps_what_it_had(source: Path, far: Path) -> None:
    fill(far / "step-000001", b"old ")
    before = content(far / "step-000001")

    def others_write(target: Path) -> None:
        with pytest.raises(OSError, match="No space left"):
            (far / "theirs").write_bytes(b"x" * (5 << 20))

    with pytest.raises(OSError) as caught:
        copy_checked(source, far / "step-000001", copy=after(2, others_write))
    assert caught.value.errno == errno.ENOSPC
    assert content(far / "step-000001") == before and [p.name for p in far.iterdir() if p.name.startswith(".")] == []


def test_a_mount_that_goes_in_the_middle_leaves_nothing_under_its_point(source: Path, far: Path) -> None:
    is_there = partial(os.path.ismount, far)
    with pytest.raises(OSError):
        copy_checked(source, far / "a/step", is_there=is_there, copy=after(2, lambda target: unmount(far)))
    assert list(far.iterdir()) == [], "nothing was written to this machine's disk instead"
    with pytest.raises(OSError, match="it is no longer mounted"):
        copy_checked(source, far / "a/step", is_there=is_there)
    assert list(far.iterdir()) == []
    mount(far)
    copy_checked(source, far / "a/step", is_there=is_there)
    assert content(far / "a/step") == content(source)


def test_a_mount_that_goes_before_the_name_is_given_is_no_success(source: Path, far: Path) -> None:
    is_there = partial(os.path.ismount, far)
    with pytest.raises(OSError, match="it is no longer mounted"):
        copy_checked(source / "state.json", far / "run.json", is_there=is_there, copy=after(1, replace_mount(far)))
    assert not (far / "run.json").exists()


def replace_mount(far: Path) -> Callable[[Path], None]:
    """The mount goes, and what was written so far is in the folder below it."""

    def go(target: Path) -> None:
        held = target.read_bytes()
        unmount(far)
        target.write_bytes(held)

    return go


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV, errno.ENOTEMPTY])
def test_where_folders_cannot_be_renamed_files_are_and_the_one_that_counts_last(
    source: Path, far: Path, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(hidden: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    order: list[str] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(b).name), replace(a, b)))
    copy_checked(source, far / "step", name_folder=refuse)
    assert content(far) == {f"step/{name}": text for name, text in content(source).items()}
    assert order[-2:] == ["adapter_model.safetensors", "state.json"] and len(order) == 5


def test_a_disk_that_is_gone_is_not_tried_file_by_file(source: Path, far: Path) -> None:
    def refuse(hidden: Path, target: Path) -> None:
        raise OSError(errno.EIO, "broken")

    with pytest.raises(OSError, match="broken"):
        copy_checked(source, far / "step", name_folder=refuse)
    assert list(far.iterdir()) == []


def test_a_source_that_is_gone_is_an_error(tmp_path: Path, far: Path) -> None:
    with pytest.raises(FileNotFoundError):
        copy_checked(tmp_path / "nothing", far / "step")
    assert list(far.iterdir()) == []
