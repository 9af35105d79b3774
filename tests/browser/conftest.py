"""Chromium, the two front ends, and a folder for screenshots (``NBQLORA_SCREENSHOTS``)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.fronts import ClassicFront, Front, LabFront
from tests.browser.servers import REPOSITORY, classic, lab
from tests.tiny import make_rows

CHROMIUM = "/usr/bin/chromium"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """Debian's chromium under playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs nbqlora[browser]")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no {CHROMIUM}; apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def pictures() -> Path:
    """Where screenshots are kept."""
    folder = Path(os.environ.get("NBQLORA_SCREENSHOTS", REPOSITORY / "tests" / "browser" / "artefacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _furnish(folder: Path, tiny_folder: Path) -> Path:
    """Rows and the model."""
    (folder / "rows.json").write_text(json.dumps(make_rows(12)))
    shutil.copytree(tiny_folder, folder / "tiny")
    return folder


@pytest.fixture
def folder(tmp_path: Path, tiny_folder: Path) -> Path:
    """A folder with rows and the model."""
    return _furnish(tmp_path, tiny_folder)


@pytest.fixture(scope="session", params=["lab", "classic"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, Path]]:
    """Front end, address and folder of a server; the folder has rows and the model."""
    folder = _furnish(tmp_path_factory.mktemp(request.param), request.getfixturevalue("tiny_folder"))
    if request.param == "lab":
        pytest.importorskip("jupyterlab", reason="needs nbqlora[browser]")
        with lab(folder) as address:
            yield "lab", address, folder
        return
    packages = os.environ.get("NBQLORA_CLASSIC", "")
    if not packages:
        pytest.skip("NBQLORA_CLASSIC names no folder with the classic notebook; .ci/browser makes one")
    with classic(folder, Path(packages)) as address:
        yield "classic", address, folder


@pytest.fixture
def front(served: tuple[str, str, Path], chromium: Any, pictures: Path) -> Iterator[Front]:
    """A page of the front end; whatever its console said as an error fails the test."""
    name, address, folder = served
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    kind = LabFront if name == "lab" else ClassicFront
    front = kind(context.new_page(), address, folder, pictures)
    yield front
    context.close()
    assert front.errors == []
