"""Names that change at once, and what is put back when they could not."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

import pytest

from nbqlora.hub.atomic import (
    hidden_beside,
    new_folder,
    recover_folder,
    remove_folder,
    remove_leftovers,
    replace_folder,
    swapped,
    sync,
)


def folder_of(path: Path, **files: str) -> Path:
    path.mkdir()
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def files_of(path: Path) -> dict[str, str]:
    return {f.name: f.read_text() for f in path.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("swap", [True, False])
def test_a_folder_takes_the_place_of_another_one_or_of_none(tmp_path: Path, swap: bool) -> None:
    for text in ("first", "second"):
        replace_folder(folder_of(hidden_beside(tmp_path / "a"), file=text), tmp_path / "a", swap=swap)
        assert names(tmp_path) == ["a"] and files_of(tmp_path / "a") == {"file": text}


def test_the_names_are_changed_in_one_step_where_that_works(tmp_path: Path) -> None:
    one, other = folder_of(tmp_path / "one", file="1"), folder_of(tmp_path / "other", file="2")
    inodes = one.stat().st_ino, other.stat().st_ino
    assert swapped(one, other)
    assert (other.stat().st_ino, one.stat().st_ino) == inodes and files_of(one) == {"file": "2"}


def test_a_system_that_cannot_swap_says_so_and_nothing_is_done(tmp_path: Path) -> None:
    # A folder and one inside it: the kernel's answer is the one of a file system that knows no swap.
    inner = folder_of(folder_of(tmp_path / "a") / "b", file="1")
    assert not swapped(tmp_path / "a", inner) and files_of(inner) == {"file": "1"}
    with pytest.raises(FileNotFoundError):
        swapped(inner, tmp_path / "nowhere")


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("mine")
    with pytest.raises(NotADirectoryError), new_folder(tmp_path / "a", replace=True):
        pass
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "mine"


def test_a_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "big").mkdir(), (tmp_path / "run").mkdir()
    folder_of(tmp_path / "big" / "a", file="1")
    (tmp_path / "run" / "a").symlink_to(tmp_path / "big" / "a")
    with new_folder(tmp_path / "run" / "a", replace=True) as new:
        assert new.parent == tmp_path / "big", "on the disk where it stays"
        (new / "file").write_text("2")
    assert (tmp_path / "run" / "a").is_symlink() and files_of(tmp_path / "run" / "a") == {"file": "2"}
    assert names(tmp_path / "big") == ["a"] and names(tmp_path / "run") == ["a"]


def killed_between(folder: Path) -> None:
    """What a kill between the two renames leaves."""
    folder_of(folder / ".saving-a-former", file="former")
    folder_of(folder / ".saving-a-0123abcd", file="new")


def test_what_stepped_aside_is_put_back_by_a_reader_and_by_the_next_start(tmp_path: Path) -> None:
    killed_between(tmp_path)
    recover_folder(tmp_path / "a")
    assert files_of(tmp_path / "a") == {"file": "former"} and ".saving-a-former" not in names(tmp_path)
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["a"]

    (tmp_path / "other").mkdir()
    killed_between(tmp_path / "other")
    remove_leftovers(tmp_path / "other")
    assert names(tmp_path / "other") == ["a"] and files_of(tmp_path / "other" / "a") == {"file": "former"}


def test_what_stepped_aside_is_put_back_before_it_is_replaced(tmp_path: Path) -> None:
    killed_between(tmp_path)
    replace_folder(tmp_path / ".saving-a-0123abcd", tmp_path / "a", swap=False)
    assert names(tmp_path) == ["a"] and files_of(tmp_path / "a") == {"file": "new"}


def test_a_former_folder_beside_one_with_the_name_is_a_leftover(tmp_path: Path) -> None:
    killed_between(tmp_path)
    folder_of(tmp_path / "a", file="there")
    recover_folder(tmp_path / "a")
    assert files_of(tmp_path / "a") == {"file": "there"}
    replace_folder(tmp_path / ".saving-a-0123abcd", tmp_path / "a", swap=False)
    assert files_of(tmp_path / "a") == {"file": "new"} and names(tmp_path) == ["a"]


def test_links_are_removed_and_not_what_they_lead_to(tmp_path: Path) -> None:
    kept = folder_of(tmp_path / "kept", file="1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".saving-x-1").symlink_to(kept)
    (tmp_path / "run" / ".saving-y-1").symlink_to("nowhere")
    (tmp_path / "run" / "step-000001").symlink_to(kept)
    remove_leftovers(tmp_path / "run")
    assert names(tmp_path / "run") == ["step-000001"]
    remove_folder(tmp_path / "run" / "step-000001")
    assert names(tmp_path / "run") == [] and files_of(kept) == {"file": "1"}


def test_a_link_among_the_files_is_kept_as_one(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a") as new:
        (new / "link").symlink_to("nowhere")
    assert os.readlink(tmp_path / "a" / "link") == "nowhere"


def test_a_file_system_without_sync_of_folders_is_no_error() -> None:
    handle = os.open("/proc/self", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match=re.escape("[Errno 22]")):
            os.fsync(handle)
    finally:
        os.close(handle)
    sync(Path("/proc/self"))


def test_a_file_that_cannot_be_synced_is_an_error(tmp_path: Path) -> None:
    assert stat.S_ISREG(Path("/proc/self/status").stat().st_mode)
    with pytest.raises(OSError, match=re.escape("[Errno 22]")):
        sync(Path("/proc/self/status"))
    with pytest.raises(FileNotFoundError):
        sync(tmp_path / "nowhere")
