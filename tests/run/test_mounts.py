"""Which folders are slow or may vanish, by the system's table of mounts; and where their files are written first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nbqlora.run.mounts import SLOW_FOLDERS, in_memory, mount_of, mount_point, read_mounts, slow_mount
from nbqlora.run.places import work_folder

COLAB = """\
overlay / overlay rw,relatime 0 0
proc /proc proc rw 0 0
fusectl /sys/fs/fuse/connections fusectl rw 0 0
tmpfs /dev/shm tmpfs rw 0 0
/dev/sda1 /content/disk ext4 rw 0 0
drive /content/drive fuse rw,nosuid,nodev 0 0
rclone /mnt/my\\040remote fuse.rclone rw 0 0
/dev/sdb1 /mnt/ntfs fuseblk rw 0 0
server:/home /home nfs4 rw 0 0
/dev/sdc1 /home/local ext4 rw 0 0
old /mnt/twice nfs rw 0 0
/dev/sdd1 /mnt/twice ext4 rw 0 0
cut line
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    file = tmp_path / "mounts"
    file.write_text(COLAB)
    return file


@pytest.mark.parametrize(
    ("folder", "point"),
    [
        ("/content/drive/MyDrive/run1", "/content/drive"),
        ("/content/drives/run1", None),
        ("/content/runs/run1", None),
        ("/content/disk/run1", None),
        ("/mnt/my remote/run1", "/mnt/my remote"),
        ("/mnt/ntfs/run1", None),
        ("/home/me/runs/run1", "/home"),
        ("/home/local/run1", None),
        ("/mnt/twice/run1", None),
    ],
)
def test_folders_behind_a_network_or_a_program_are_slow(table: Path, folder: str, point: str | None) -> None:
    assert slow_mount(Path(folder), {}, table) == (None if point is None else Path(point))


def test_what_all_of_the_machine_stands_on_is_not_slow(tmp_path: Path) -> None:
    (tmp_path / "mounts").write_text("none / 9p rw,trans=fd 0 0\n")
    assert slow_mount(Path("/home/someone/runs"), {}, tmp_path / "mounts") is None


def test_without_a_table_nothing_is_slow_but_what_is_declared(tmp_path: Path) -> None:
    none = tmp_path / "nothing"
    assert slow_mount(tmp_path / "a", {}, none) is None and mount_of(tmp_path, read_mounts(none)) is None
    environ = {SLOW_FOLDERS: os.pathsep.join(["", "/elsewhere", str(tmp_path)])}
    assert slow_mount(tmp_path / "a/b", environ, none) == mount_point(tmp_path)


def test_a_link_is_as_slow_as_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "link").symlink_to("far")
    (tmp_path / "mounts").write_text(f"x / ext4 rw 0 0\ns {tmp_path}/far cifs rw 0 0\n")
    assert slow_mount(tmp_path / "link/run1", {}, tmp_path / "mounts") == tmp_path.resolve() / "far"


def test_this_machines_own_table_is_read() -> None:
    assert mount_of(Path("/proc"), read_mounts()).kind == "proc"
    assert slow_mount(Path.cwd(), {}) is None, "a test machine's own disk"
    assert mount_point(Path("/proc/self/no/such")) == Path("/proc")
    assert in_memory(Path("/proc")) is False


def test_a_slow_folder_is_written_on_a_disk_that_has_room_and_found_again(tmp_path: Path) -> None:
    far, table, ram = tmp_path / "far", tmp_path / "mounts", tmp_path / "ram"
    ram.mkdir()
    table.write_text(f"x / ext4 rw 0 0\ns {far} cifs rw 0 0\nt {ram} tmpfs rw 0 0\n")
    roots = [ram, far, tmp_path / "disk"]
    assert work_folder(tmp_path / "near", 1, {}, table, roots) == (tmp_path / "near", "")
    work, note = work_folder(far / "run1", 1, {}, table, roots)
    assert work.parent == tmp_path / "disk" and work.name.startswith("run1-")
    assert note == f"{far}/run1 is no disk of this machine: written to {work}, then copied there"
    assert not work.parent.exists(), "nothing is made by asking"
    assert work_folder(far / "x/../run1", 1, {}, table, roots)[0] == work
    assert work_folder(far / "other/run1", 1, {}, table, roots)[0] != work
    direct, note = work_folder(far / "run1", 1 << 62, {}, table, roots)
    assert direct == far / "run1" and "none has room for the files until they are copied" in note


def test_the_usual_places_are_this_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    environ = {SLOW_FOLDERS: str(tmp_path / "far")}
    mine = tmp_path / f"nbqlora-{os.getuid()}"
    assert work_folder(tmp_path / "far/a", 1, environ)[0].parent == mine
    mine.symlink_to(tmp_path / "anothers")
    assert work_folder(tmp_path / "far/a", 1, environ)[0].parent != mine
