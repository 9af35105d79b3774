"""A process that has imported everything and runs scripts in forks of itself: alone, and without importing again.

python -m tests.hub.gguf.warm < paths of scripts, a line each
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[3]


class Warm:
    """The process, seen from outside."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder

    def run(self, script: str) -> list[str]:
        """The lines that a script printed.

        Raises:
            AssertionError: it failed; with all that it printed.
        """
        file = self._folder / "script.py"
        file.write_text(script)
        assert self._process.stdin and self._process.stdout
        print(file, file=self._process.stdin, flush=True)
        status = self._process.stdout.readline().strip()
        printed = file.with_suffix(".out").read_text()
        assert status == "0", f"ended with {status}: {printed}"
        return printed.splitlines()


@contextmanager
def warm_process() -> Iterator[Warm]:
    """Start it, and end it."""
    command = [sys.executable, "-m", "tests.hub.gguf.warm"]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        yield Warm(process, Path(folder))
        process.communicate()


def _run(file: Path) -> int:
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        output = os.open(file.with_suffix(".out"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        exec(compile(file.read_text(), str(file), "exec"), {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main() -> None:
    from nbqlora.hub.gguf import export_gguf
    from tests.hub.gguf.stream import FolderStream
    from tests.hub.gguf.tiny_models import save

    with tempfile.TemporaryDirectory() as folder:
        # The first one imports what it needs.
        export_gguf(FolderStream(save(Path(folder) / "model", "llama", {})), Path(folder) / "model.gguf")
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(_run(Path(line.strip())), file=answers, flush=True)


if __name__ == "__main__":
    main()
