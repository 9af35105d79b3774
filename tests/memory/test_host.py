"""RAM, container limits and disk."""

import sys
from pathlib import Path

import pytest

from nbqlora.memory.host import (
    ControlGroup,
    control_groups,
    disk_free_bytes,
    peak_resident_bytes,
    read_host,
    resident_bytes,
    tighten,
)

GIB = 1 << 30
NO_LIMIT_V1 = 9223372036854771712


def make_group(folder: Path, version: int, limit: str, usage: int, cached: tuple[int, int] = (0, 0)) -> None:
    limit_name, usage_name, prefix = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        2: ("memory.max", "memory.current", ""),
    }[version]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / usage_name).write_text(f"{usage}\n")
    stat = f"anon 5\n{prefix}active_file {cached[0]}\n{prefix}inactive_file {cached[1]}\n"
    (folder / "memory.stat").write_text(stat)


def set_membership(root: Path, text: str) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(text)


def test_version_2_inside_a_container(tmp_path: Path) -> None:
    set_membership(tmp_path, "0::/\n")
    make_group(tmp_path / "sys/fs/cgroup", 2, str(2 * GIB), 1500, (300, 200))
    assert control_groups(tmp_path) == (ControlGroup(limit_bytes=2 * GIB, used_bytes=1000),)


def test_version_2_takes_the_groups_above_too(tmp_path: Path) -> None:
    set_membership(tmp_path, "0::/user.slice/job\n")
    base = tmp_path / "sys/fs/cgroup"
    base.mkdir(parents=True)  # the root group has no memory.max
    make_group(base / "user.slice", 2, str(3 * GIB), GIB)
    make_group(base / "user.slice/job", 2, "max", 10)
    assert control_groups(tmp_path) == (ControlGroup(limit_bytes=3 * GIB, used_bytes=GIB),)


def test_version_1_with_the_path_of_the_host(tmp_path: Path) -> None:
    set_membership(tmp_path, "9:cpu,cpuacct:/docker/f00\n4:memory:/docker/f00\n")
    make_group(tmp_path / "sys/fs/cgroup/memory", 1, str(2 * GIB), 900, (100, 200))
    assert control_groups(tmp_path) == (ControlGroup(limit_bytes=2 * GIB, used_bytes=600),)


def test_version_1_without_a_limit_changes_nothing(tmp_path: Path) -> None:
    set_membership(tmp_path, "4:memory:/job\n0::/\n")
    make_group(tmp_path / "sys/fs/cgroup/memory/job", 1, str(NO_LIMIT_V1), 900)
    assert tighten(24 * GIB, 20 * GIB, control_groups(tmp_path)) == (24 * GIB, 20 * GIB)


@pytest.mark.parametrize("membership", ["", "0::/../../outside\n"])
def test_no_readable_group(tmp_path: Path, membership: str) -> None:
    set_membership(tmp_path, membership)
    assert control_groups(tmp_path) == ()
    assert control_groups(tmp_path / "nowhere") == ()


@pytest.mark.parametrize(
    ("groups", "total", "free"),
    [
        ((), 24, 20),
        (((2, 1),), 2, 1),
        (((30, 1),), 24, 20),
        (((2, 3),), 2, 0),
        (((8, 1), (4, 3)), 4, 1),
        (((23, 1),), 23, 20),
        (((30, 25),), 24, 5),
    ],
)
def test_the_tightest_limit_counts(groups: tuple[tuple[int, int], ...], total: int, free: int) -> None:
    limits = tuple(ControlGroup(limit_bytes=limit * GIB, used_bytes=used * GIB) for limit, used in groups)
    assert tighten(24 * GIB, 20 * GIB, limits) == (total * GIB, free * GIB)


def test_this_machine() -> None:
    host = read_host()
    assert 0 < host.process_bytes < host.total_bytes
    assert 0 < host.free_bytes < host.total_bytes
    assert host.used_bytes + host.free_bytes == host.total_bytes
    assert host.peak_process_bytes >= host.process_bytes - (4 << 20)


def test_a_container_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    group = ControlGroup(limit_bytes=2 * GIB, used_bytes=GIB // 2)
    monkeypatch.setattr("nbqlora.memory.host.control_groups", lambda: (group,))
    monkeypatch.setattr("nbqlora.memory.host._machine_ram", lambda: (24 * GIB, 20 * GIB))
    host = read_host()
    assert (host.total_bytes, host.free_bytes) == (2 * GIB, 1.5 * GIB)
    assert host.notes == ("this container may use 2.0 GiB of the machine's 24.0 GiB RAM",)


def test_without_psutil_the_figures_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with_psutil, resident = read_host(), resident_bytes()
    monkeypatch.setitem(sys.modules, "psutil", None)
    without = read_host()
    assert without.total_bytes == with_psutil.total_bytes
    assert abs(without.free_bytes - with_psutil.free_bytes) < GIB
    assert abs(resident_bytes() - resident) < 16 << 20


def test_the_high_water_mark_keeps_a_freed_block() -> None:
    before = resident_bytes()
    block = bytearray(b"x") * (128 << 20)
    del block
    assert peak_resident_bytes() >= before + (120 << 20)


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    here, there = disk_free_bytes(tmp_path), disk_free_bytes(tmp_path / "runs/run1")
    assert abs(here - there) < GIB
    assert disk_free_bytes("runs/none") > 0
