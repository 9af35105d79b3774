"""Real kernels, driven as a notebook does it: cells in, output out, and the interrupt that ■ sends."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from types import TracebackType
from typing import Any

import pytest
from jupyter_client.manager import KernelManager

from nbqlora.hub.demo_model import cache_folder

# Colab's kernel of 2026, with what of its own age it cannot do without; all of it pure Python.
OLD = {
    "ipykernel": "6.17.1",
    "ipython": "7.34.0",
    "traitlets": "5.7.1",
    "jupyter_client": "7.4.9",
    "backcall": "0.2.0",
    "decorator": "4.4.2",
    "entrypoints": "0.4",
    "nest_asyncio": "1.6.0",
    "pickleshare": "0.7.5",
}
# Kernels of other years on the IPython that is installed.
BETWEEN = {
    "6.31": {"ipykernel": "6.31.0", "nest_asyncio": "1.6.0"},
    "7.3": {"ipykernel": "7.3.0", "nest_asyncio": "1.6.0"},
}
PATIENCE_SECONDS = 180
# Threads of a tiny model only wait for each other on a busy machine.
QUICK = {"OMP_NUM_THREADS": "1"}


class NotInstallableError(Exception):
    """pip could not get the old packages; the message is its own."""


def old_kernel_folder() -> Path:
    """A folder with Colab's kernel, as :func:`folder_with` makes it."""
    return folder_with(OLD)


def folder_with(packages: Mapping[str, str]) -> Path:
    """A folder with a kernel, to stand before ``site-packages``; installed once, then kept.

    Args:
        packages: version of each; all that it needs beside what is installed.

    Raises:
        NotInstallableError: pip is missing or reaches no index.
    """
    folder = cache_folder() / "for-tests" / f"ipykernel-{packages['ipykernel']}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as made:
        pins = [f"{name}=={version}" for name, version in packages.items()]
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "--target", f"{made}/whole", *pins], capture_output=True, text=True)
        if done.returncode:
            raise NotInstallableError(done.stderr.strip()[-300:])
        if not folder.is_dir():
            os.rename(f"{made}/whole", folder)
    return folder


def folder_or_skip(packages: Mapping[str, str]) -> Path:
    """:func:`folder_with`, or the test is skipped with pip's own words."""
    try:
        return folder_with(packages)
    except NotInstallableError as error:
        pytest.skip(f"ipykernel {packages['ipykernel']} could not be installed: {error}")


@dataclass
class Said:
    """What a cell sent.

    Args:
        text: everything printed or displayed, updates too.
        error: the exception's name and message; "" for a cell that ended well.
        status: what the kernel answers: "ok" or "error", which is what test runners and papermill read.
        shown: what stands in the cell for an error: its traceback lines.
    """

    text: str = ""
    error: str = ""
    status: str = ""
    shown: list[str] = field(default_factory=list)


class Kernel:
    """A running kernel.

    Args:
        folder: where it works.
        before: a folder to stand before ``site-packages``; None for the kernel that is installed.
        patience_seconds: how long a cell may take.
        environ: variables beside this process's own.
    """

    def __init__(
        self,
        folder: Path,
        before: Path | None = None,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        environ: Mapping[str, str] = QUICK,
    ) -> None:
        self._patience_seconds = patience_seconds
        known = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
        paths = [str(p) for p in [before] if p] + known
        environment = {**os.environ, "NBQLORA_DISPLAY": "live", "PYDEVD_DISABLE_FILE_VALIDATION": "1", **environ}
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self._manager = KernelManager(kernel_name="python3")
        self._manager.start_kernel(env=environment, cwd=str(folder))
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=PATIENCE_SECONDS)

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    @property
    def pid(self) -> int:
        """The kernel's process."""
        return int(self._manager.provisioner.pid)  # type: ignore[union-attr]

    def interrupt(self) -> None:
        """What ■ does."""
        self._manager.interrupt_kernel()

    def run(self, code: str, *, interrupt_at: Sequence[str] = (), act: Callable[[], None] | None = None) -> Said:
        """Run a cell to its end.

        Args:
            interrupt_at: patterns; when the first has been said, the kernel is interrupted, then the second is
                waited for, and so on.
            act: what is done then instead.
        """
        said, waiting, heard = Said(), list(interrupt_at), ""
        # Without stop_on_error=False a kernel drops the cell that comes right behind one that failed.
        request = self._client.execute(code, stop_on_error=False)
        until = time.monotonic() + self._patience_seconds
        while True:
            message = self._message(until, said)
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            if message["msg_type"] == "status" and content["execution_state"] == "idle":
                assert not waiting, f"{waiting[0]!r} was not said: {said}"
                said.status = self._reply(request)
                return said
            text = _text(message)
            said.text, heard = said.text + text, heard + text
            if message["msg_type"] == "error":
                said.error = f"{content['ename']}: {content['evalue']}"
                said.shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in content["traceback"]]
            found = re.search(waiting[0], heard) if waiting else None
            if found:
                waiting, heard = waiting[1:], heard[found.end() :]
                (act or self.interrupt)()

    def _reply(self, request: str) -> str:
        while True:
            reply = self._client.get_shell_msg(timeout=PATIENCE_SECONDS)
            if reply["parent_header"].get("msg_id") == request:
                return str(reply["content"]["status"])

    def _message(self, until: float, said: Said) -> dict[str, Any]:
        while time.monotonic() < until:
            assert self._manager.is_alive(), f"the kernel died: {said}"
            try:
                message: dict[str, Any] = self._client.get_iopub_msg(timeout=1)
                return message
            except Empty:
                continue
        raise TimeoutError(f"the cell did not end: {said}")


def _text(message: dict[str, Any]) -> str:
    content = message["content"]
    return str(content.get("text") or content.get("data", {}).get("text/plain") or "") + "\n"
