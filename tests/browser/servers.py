"""Front ends as people run them: JupyterLab on what is installed, and the classic notebook on Colab's packages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.notebook.kernels import QUICK

REPOSITORY = Path(__file__).parents[2]
PATIENCE_SECONDS = 60
# Cells that scrolled away would be taken out of the page; news would be asked for.
_LAB_SETTINGS = {
    "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
}


@contextmanager
def lab(folder: Path) -> Iterator[str]:
    """JupyterLab on a folder; its address."""
    settings = folder / ".lab-settings"
    for name, values in _LAB_SETTINGS.items():
        (settings / name).parent.mkdir(parents=True, exist_ok=True)
        (settings / name).write_text(json.dumps(values))
    options = ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={folder}"]
    environment = {"JUPYTERLAB_SETTINGS_DIR": str(settings), "JUPYTER_PATH": os.pathsep.join(_shares())}
    with _server("jupyterlab", options, folder, environment, [str(REPOSITORY)]) as address:
        yield address


@contextmanager
def classic(folder: Path, packages: Path) -> Iterator[str]:
    """The classic notebook, with its own kernel and widgets from ``packages``; its address."""
    options = ["--NotebookApp.token=", "--NotebookApp.password=", f"--NotebookApp.notebook_dir={folder}"]
    environment = {
        "JUPYTER_PATH": str(packages / "share" / "jupyter"),
        "JUPYTER_CONFIG_PATH": str(packages / "etc" / "jupyter"),
    }
    with _server("notebook", options, folder, environment, [str(packages), str(REPOSITORY)]) as address:
        yield address


def _shares() -> list[str]:
    """Where front ends find the widgets' code: beside every folder that packages are taken from."""
    roots = [Path(p).parents[2] for p in sys.path if p.endswith("site-packages")]
    return [str(root / "share" / "jupyter") for root in roots]


@contextmanager
def _server(
    module: str, options: list[str], folder: Path, environment: dict[str, str], paths: list[str]
) -> Iterator[str]:
    port = _free_port()
    own = {"JUPYTER_CONFIG_DIR": str(folder / ".config"), "JUPYTER_DATA_DIR": str(folder / ".data")}
    env = {**os.environ, **QUICK, **own, **environment, "NBQLORA_DISPLAY": "live", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root", f"--port={port}", *options]
    with (folder / f"{module}.log").open("w") as log:
        server = subprocess.Popen(command, env=env, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(server, address, folder / f"{module}.log")
        yield address
    finally:
        server.terminate()
        server.wait(PATIENCE_SECONDS)


def _wait(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            with urllib.request.urlopen(f"{address}/api/status"):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise TimeoutError(log.read_text()[-2000:])


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
