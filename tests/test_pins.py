"""Installing nbqlora over Colab's packages moves none of those that a running notebook stands on.

pip itself is asked, without installing: in an environment where Colab's versions are there by name. It needs an index;
where none answers, the tests are skipped and say so. What is there by name has no requirements of its own, so this
shows what nbqlora and all that it brings ask for.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tomllib
import venv
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

# A changed one of these forces a restart of the runtime, or breaks the page.
STAYS = {
    "ipython": "7.34.0",
    "ipykernel": "6.17.1",
    "ipywidgets": "7.7.1",
    "traitlets": "5.7.1",
    "tornado": "6.5.1",
    "torch": "2.11.0+cu128",
    "triton": "3.6.0",
}
# Others of Colab's, which may be upgraded.
THERE = {
    "accelerate": "1.14.0",
    "datasets": "4.0.0",
    "peft": "0.20.0",
    "pyarrow": "18.1.0",
    "torchao": "0.10.0",
    "transformers": "5.15.0",
}
PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
Ask = Callable[[Sequence[str]], dict[str, str]]


@pytest.fixture
def would_install(tmp_path: Path) -> Ask:
    """What pip would install for some requirements, by name, over Colab's packages."""
    home = tmp_path / "colab"
    venv.create(home, with_pip=False)
    site = Path(sysconfig.get_path("purelib", "venv", vars={"base": str(home), "platbase": str(home)}))
    for name, version in {**STAYS, **THERE}.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text("")
    pip = [sys.executable, "-m", "pip", "--python", str(home), "install", "-q", "--disable-pip-version-check"]
    reached = subprocess.run([*pip, "--dry-run", "--no-deps", "packaging"], capture_output=True, text=True)
    if reached.returncode:
        pytest.skip(f"pip reaches no index: {reached.stderr.strip()[-200:]}")

    def ask(requirements: Sequence[str]) -> dict[str, str]:
        report = tmp_path / "report.json"
        done = subprocess.run([*pip, "--dry-run", "--report", report, *requirements], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        return {one["name"].lower().replace("_", "-"): one["version"] for one in found}

    return ask


def test_colabs_packages_stay_where_they_are(would_install: Ask) -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    new = would_install([*project["dependencies"], *project["optional-dependencies"]["gguf"]])
    assert {"bitsandbytes", "trl", "datasets", "pyarrow"} <= new.keys(), "what Colab lacks, or has too old, comes"
    assert {name: new[name] for name in STAYS if name in new} == {}


def test_a_floor_above_colabs_would_be_seen(would_install: Ask) -> None:
    assert "ipython" in would_install(["ipython>=8"])
