"""The temporary folder: gone at the end, also after a process that was killed, and never while another runs."""

import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbqlora.data.scratch import PREFIX, ScratchFolder

HOLDER = """
import tempfile, time
from nbqlora.data.scratch import ScratchFolder
folder = ScratchFolder()
folder.new_file("rows").write_text("x")
print(folder.path, flush=True)
time.sleep({seconds})
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def hold(seconds: float) -> tuple["subprocess.Popen[str]", Path]:
    command = [sys.executable, "-c", HOLDER.format(seconds=seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_goes_with_its_object(temporary: Path) -> None:
    folder = ScratchFolder()
    assert folder.path.parent == temporary
    assert [folder.new_file("rows").name, folder.new_file("packs").name] == ["rows-1.arrow", "packs-2.arrow"]
    folder.new_file("rows").write_bytes(b"x")
    path = folder.path
    del folder
    gc.collect()
    assert not path.exists()
    folder = ScratchFolder()
    folder.remove()
    folder.remove()
    assert list(temporary.iterdir()) == []


def test_it_goes_at_the_end_of_the_process(temporary: Path) -> None:
    process, path = hold(0)
    assert process.wait(20) == 0
    assert path.name.startswith(PREFIX)
    assert not path.exists()


def test_a_killed_process_leaves_it_to_the_next(temporary: Path) -> None:
    process, path = hold(60)
    assert path.exists()
    # In use, by a process that lives.
    ScratchFolder().remove()
    assert (path / "rows-1.arrow").exists()
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    assert path.exists()
    own = ScratchFolder()
    assert not path.exists()
    assert own.path.exists()


def test_a_forked_child_leaves_it_to_its_parent(temporary: Path) -> None:
    folder = ScratchFolder()
    child = os.fork()
    if not child:
        # What a child does that ends as a program does.
        import atexit

        atexit._run_exitfuncs()
        os._exit(0)
    os.waitpid(child, 0)
    assert folder.path.exists()


def test_what_is_not_ours_is_left_alone(temporary: Path) -> None:
    strange = temporary / f"{PREFIX}of-somebody"
    strange.mkdir()
    begun = time.monotonic()
    ScratchFolder().remove()
    assert strange.exists()
    assert time.monotonic() - begun < 5
