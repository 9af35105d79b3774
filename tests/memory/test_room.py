"""Room in RAM and on disk, and whether a folder may be written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from nbqlora.memory import room
from nbqlora.memory.host import HostMemory

GIB = 1 << 30


def test_ram_that_is_nearly_used_up_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def host(free: float, *notes: str) -> None:
        memory = HostMemory(
            total_bytes=2 * GIB, free_bytes=int(free * GIB), process_bytes=0, peak_process_bytes=0, notes=notes
        )
        monkeypatch.setattr(room, "read_host", lambda: memory)

    host(1.2, "this container may use 2.0 GiB of the machine's 31.3 GiB RAM")
    check = room.ram_check()
    assert (check.status, str(check)) == (
        "warning",
        "1.2 GiB of 2.0 GiB free (this container may use 2.0 GiB of the machine's 31.3 GiB RAM); "
        "even the demo takes 1.5 GiB; end other programs, or restart the kernel",
    )
    host(2)
    assert (room.ram_check().status, room.ram_check().found) == ("ok", "2.0 GiB of 2.0 GiB free")


def checked(folder: Path, needed_bytes: float) -> tuple[str, str]:
    check = room.disk_check("output", folder, needed_bytes=needed_bytes, needed_for="checkpoints", move="use another")
    return check.status, str(check)


def test_a_disk_with_room_and_one_without(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    status, said = checked(tmp_path / "runs/run1", free / 2)
    assert status == "ok" and said.endswith(f"free for {tmp_path}/runs/run1")
    status, said = checked(tmp_path, 1000 * 1024 * GIB)
    assert (status, said.partition(f"free for {tmp_path}")[2]) == (
        "warning",
        "; checkpoints take about 1024000 GiB; use another",
    )


def test_a_folder_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert checked(tmp_path / "file/runs", 1) == (
        "problem",
        f"{tmp_path}/file/runs cannot be made: {tmp_path}/file is a file; use another",
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_a_problem(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert checked(tmp_path / "runs", 1) == ("problem", f"{tmp_path} may not be written; use another")


def test_the_home_folder_is_shortened() -> None:
    assert room.shown(Path.home() / "runs") == "~/runs"
    assert room.shown(Path(str(Path.home()) + "work")) == str(Path.home()) + "work"
