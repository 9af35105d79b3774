"""What must be looked at in a process of its own: memory, a full disk, and being killed at random moments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub.gguf.kills import make_model
from tests.hub.gguf.tiny_models import save
from tests.hub.gguf.warm import Warm, warm_process


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with warm_process() as process:
        yield process


MEMORY = """
import re, sys
from pathlib import Path
from nbqlora.hub.gguf import export_gguf
from tests.hub.gguf.stream import FolderStream

def memory():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

def look(share, text):
    global highest
    highest = max(highest, memory())

opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
for quantization in ("F32", "Q4_0"):
    before, highest = memory(), 0.0
    export_gguf(FolderStream(Path({folder!r}), rows=64), Path({target!r}), quantization, say=look)
    print(quantization, highest - before)
print([name for name in opened if {folder!r} in name and not name.endswith((".safetensors", ".json", ".jinja"))])
"""


def test_memory_is_bounded_by_a_piece_and_not_by_a_tensor(warm: Warm, tmp_path: Path) -> None:
    # A head of 16000 x 1024 is 62 MiB in fp32; a piece of it is 256 KiB.
    wide = {"vocab_size": 16000, "hidden_size": 1024, "num_hidden_layers": 1, "intermediate_size": 64}
    model = save(tmp_path / "model", "llama", wide)
    *grown, opened = warm.run(MEMORY.format(folder=str(model), target=str(tmp_path / "model.gguf")))
    assert opened == "[]"
    assert [line.split()[0] for line in grown] == ["F32", "Q4_0"]
    assert all(float(line.split()[1]) < 20 for line in grown), grown


FULL = """
import ctypes, os
from pathlib import Path
from nbqlora.core.errors import OutOfDiskError
from nbqlora.hub.gguf import export, export_gguf
from tests.hub.gguf.stream import FolderStream

CLONE_NEWNS, CLONE_NEWUSER, MS_REC_PRIVATE = 0x20000, 0x10000000, 0x44000
small = {small!r}
libc = ctypes.CDLL(None)
refused = libc.unshare(CLONE_NEWNS | (CLONE_NEWUSER if os.getuid() else 0))
refused = refused or libc.mount(None, b"/", None, MS_REC_PRIVATE, None)
refused = refused or libc.mount(b"none", small.encode(), b"tmpfs", 0, b"size=2m")
if refused:
    print("no disk of its own")
    raise SystemExit(0)
export._ROOM_BYTES = -(1 << 30)  # As if something else took the room in the meantime.
target = Path(small) / "model.gguf"
target.write_text("the former one")
for quantization, between in (("F32", None), ("Q6_K", None), ("Q6_K", Path({other!r}))):
    try:
        export_gguf(FolderStream(Path({folder!r}), rows=999), target, quantization, temporary_location=between)
    except OutOfDiskError as error:
        print(error)
print([file.read_text() for file in Path(small).iterdir()])
"""


def test_a_disk_that_becomes_full(warm: Warm, tmp_path: Path) -> None:
    # More than 2 MiB in any type: full while it is written here, in between, and by llama.cpp's quantizer.
    model = save(tmp_path / "model", "llama", {"vocab_size": 20000})
    small, other = tmp_path / "small", tmp_path / "other"
    small.mkdir()
    *errors, left = warm.run(FULL.format(small=str(small), other=str(other), folder=str(model)))
    if left == "no disk of its own":
        pytest.skip("this process may not mount a disk")
    assert left == "['the former one']"
    assert len(errors) == 3 and not list(other.iterdir()), errors
    for error in errors:
        assert error.startswith(f"the disk of {small} became full; the export needs ")
        assert error.endswith("nothing of it was kept")


KILLS = """
import json
from pathlib import Path
from tests.hub.gguf import kills
print(json.dumps(kills.run({kills}, 0, Path({model!r}), Path({targets!r}), kills.{quantizations})))
"""


@pytest.mark.parametrize(
    ("kills", "quantizations"),
    [
        (30, "SIMPLE"),
        pytest.param(400, "SIMPLE", marks=pytest.mark.slow),
        pytest.param(150, "WITH_K", marks=pytest.mark.slow),
    ],
)
def test_kills(kills: int, quantizations: str, warm: Warm, tmp_path: Path) -> None:
    given = {"model": str(make_model(tmp_path)), "targets": str(tmp_path / "out")}
    *_, line = warm.run(KILLS.format(kills=kills, quantizations=quantizations, **given))
    counts = json.loads(line)
    assert sum(counts.values()) - counts.get("done", 0) == kills
    assert counts["while writing"] > kills / 5
