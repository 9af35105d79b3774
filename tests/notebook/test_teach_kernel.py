"""Lessons where a room has them: in the installed kernel and in Colab's, and with a model that nobody may write to."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbqlora.hub.demo_model import demo_model
from tests.notebook.kernels import QUICK, Kernel
from tests.notebook.test_teach import RIGHT, SETUP
from tests.notebook.wire import execute, shown

# Root may write anywhere; without this capability the kernel asks the files' modes of it too, as of any student.
AS_STUDENT = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
TRY_TO_WRITE = """
import sys
from pathlib import Path
for folder in (Path(sys.argv[1]), *Path(sys.argv[1]).iterdir()):
    try:
        (folder / "mine").write_text("")
    except PermissionError:
        continue
    raise SystemExit(f"{folder} can be written to: this proves nothing")
"""
USE = """
import torch
import nbqlora
loaded = nbqlora.load("demo", max_length=64)
ids = torch.arange(64)[None]
loaded.model(input_ids=ids, labels=ids).loss.backward()
print(nbqlora.plan(model="demo", data="demo", max_length=64, max_steps=3).total_steps)
"""


def test_a_lesson_in_a_real_kernel(kernel_packages: Path | None, tmp_path: Path) -> None:
    with Kernel(tmp_path, kernel_packages) as kernel:
        assert kernel.run(SETUP).error == ""
        (verdict,) = shown(execute(kernel._client, 'numbers = "9216"\nlesson.check("numbers")\n1;'))
        assert verdict.data["text/plain"].startswith("✗ numbers: not yet\n  you gave  '9216'\n")
        assert verdict.data["text/html"].startswith('<section role="status"')
        said = kernel.run("lesson.check(numbers)")
        assert said.shown == ['LessonError: check takes the name of an exercise in quotes: lesson.check("numbers")']
        said = kernel.run("lesson.finish()")
        assert said.error.startswith("NotPassedError: ") and said.shown[:2] == [
            "NotPassedError: LoRA by numbers is not finished", "  numbers: not passed",
        ]  # fmt: skip
        assert kernel.run(RIGHT).text.count(": right") == 5
        assert kernel.run("lesson.finish()").error == ""


@pytest.fixture
def read_only_cache(tmp_path: Path) -> Iterator[Path]:
    """The demo model in a folder that only its owner, and not even she, may change."""
    folder = tmp_path / "shared"
    shutil.copytree(demo_model(), folder / demo_model().name)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    yield folder
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def test_a_shared_cache_that_nobody_may_write_to_is_enough(read_only_cache: Path, tmp_path: Path) -> None:
    home = tmp_path / "student"
    home.mkdir()
    prefix = AS_STUDENT if os.geteuid() == 0 else []
    if prefix and shutil.which(prefix[0]) is None:
        pytest.skip("root, and no setpriv to give up writing everywhere")
    before = sorted((str(p), p.stat().st_mtime_ns) for p in read_only_cache.rglob("*"))
    clean = {k: v for k, v in os.environ.items() if k not in ("PIP_INDEX_URL", "XDG_CACHE_HOME")}
    environment = {
        **clean, **QUICK, "NBQLORA_CACHE": str(read_only_cache), "HOME": str(home), "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip
    for code in (TRY_TO_WRITE, USE):
        command = [*prefix, sys.executable, "-c", code, str(read_only_cache)]
        done = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("3")
    assert before == sorted((str(p), p.stat().st_mtime_ns) for p in read_only_cache.rglob("*"))
