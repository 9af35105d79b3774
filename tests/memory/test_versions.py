"""Libraries: installed, loaded, known to work; told from metadata on disk."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from nbqlora.memory.versions import (
    KNOWN,
    MAIN,
    installed_version,
    is_older,
    libraries_check,
    restart_check,
    torchao_check,
)

ROOT = Path(__file__).parents[2]
Install = Callable[[str, str], None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """``install(name, version)``: from now on pip would say that this version is there."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))

    def add(name: str, version: str) -> None:
        for old in site.glob(f"{name.replace('-', '_')}-*.dist-info"):
            (old / "METADATA").unlink()
            old.rmdir()
        folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    return add


@pytest.fixture
def as_tested(install: Install) -> Install:
    for name, known in KNOWN.items():
        install(name, known.tested)
    return install


def test_floors_are_those_of_pyproject() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        needed = tomllib.load(file)["project"]["dependencies"]
    assert {name: known.floor for name, known in KNOWN.items()} == dict(line.split(">=") for line in needed)


def test_tested_versions_are_those_of_the_constraints() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "binder/constraints.txt").read_text(), re.M))
    assert {name: known.tested for name, known in KNOWN.items()} == {name: pins[name] for name in KNOWN}


@pytest.mark.parametrize(
    ("version", "than", "expected"),
    [
        ("1.9", "1.10", True),
        ("1.10", "1.9", False),
        ("5.15", "5.15.0", False),
        ("5.15.0", "5.15", False),
        ("2.11.0+cu128", "2.11", False),
        ("2.11.0+cu128", "2.12", True),
        ("5.24.0.dev0", "5.24", False),
        ("1.16.0rc1", "1.16.0", False),
        ("0.4.3", "1", True),
    ],
)
def test_releases_are_compared_by_their_numbers(version: str, than: str, expected: bool) -> None:
    assert is_older(version, than) is expected


def test_the_tested_set_is_all_well(as_tested: Install) -> None:
    check = libraries_check()
    assert (check.status, check.advice) == ("ok", "")
    assert check.found == ", ".join(f"{name} {KNOWN[name].tested}" for name in MAIN)


def test_an_older_library_is_a_problem_with_its_command(as_tested: Install) -> None:
    as_tested("trl", "1.14.2")
    as_tested("ipywidgets", "7.6.5")
    check = libraries_check()
    assert check.status == "problem"
    assert check.found == "trl 1.14.2 is older than 1.15, ipywidgets 7.6.5 is older than 7.7"
    assert check.advice == 'pip install "trl>=1.15" "ipywidgets>=7.7"'


def test_a_library_that_is_not_there_is_a_problem(as_tested: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [sys.path[0]])  # the folder of ``install`` only
    (next(Path(sys.path[0]).glob("peft-*")) / "METADATA").unlink()
    next(Path(sys.path[0]).glob("peft-*")).rmdir()
    check = libraries_check()
    assert (check.status, check.found) == ("problem", "peft is not installed")
    assert check.advice == 'pip install "peft>=0.19"'


def test_a_newer_library_is_said_quietly(as_tested: Install) -> None:
    as_tested("transformers", "5.24.0")
    check = libraries_check()
    assert (check.status, check.advice) == ("ok", "")
    assert "transformers 5.24.0" in check.found
    assert check.found.endswith(f"(tested up to transformers {KNOWN['transformers'].tested})")


@pytest.mark.parametrize("loaded", ["1.16.0", "1.16", "1.16.0+local"])
def test_what_is_loaded_is_what_is_installed(install: Install, monkeypatch: pytest.MonkeyPatch, loaded: str) -> None:
    module = ModuleType("trl")
    module.__version__ = loaded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", module)
    install("trl", "1.16.0")
    assert "trl" not in restart_check().found


def test_a_library_that_pip_changed_after_its_import_asks_for_a_restart(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("pyarrow")
    module.__version__ = "18.1.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", module)
    install("pyarrow", "21.0.0")
    check = restart_check()
    assert (check.status, "pyarrow 18.1.0 is loaded, 21.0.0 is installed" in check.found) == ("warning", True)
    assert check.advice.startswith("restart the kernel once (Colab: Runtime > Restart session)")


def test_asking_imports_nothing() -> None:
    before = set(sys.modules)
    restart_check(), libraries_check(), torchao_check(in_full_precision=True)
    assert set(sys.modules) == before


@pytest.mark.parametrize(
    ("torchao", "peft", "in_full_precision", "status"),
    [
        ("0.10.0", "0.21.2", True, "problem"),
        ("0.10.0", "0.19.0", False, "warning"),
        ("0.15.9+git", "0.20", True, "problem"),
        ("0.16.0", "0.21.2", True, "ok"),
        ("0.10.0", "0.18.2", True, "ok"),
    ],
)
def test_the_torchao_trap(install: Install, torchao: str, peft: str, in_full_precision: bool, status: str) -> None:
    install("torchao", torchao)
    install("peft", peft)
    check = torchao_check(in_full_precision=in_full_precision)
    assert check.status == status
    if status != "ok":
        assert check.found == (
            f"torchao {torchao} is older than 0.16: peft {peft} refuses LoRA on layers that are not in 4 bits "
            "(load_in_4bit = false, lm_head, embed_tokens)"
        )
        assert check.advice == "pip uninstall -y torchao: nothing here uses it"


def test_without_torchao_there_is_no_trap() -> None:
    assert not installed_version("torchao")
    assert torchao_check(in_full_precision=True).status == "ok"


def test_peft_does_refuse_what_the_check_says(install: Install, tmp_path: Path) -> None:
    import peft.import_utils
    import torch
    from peft import LoraConfig, get_peft_model

    (tmp_path / "site/torchao").mkdir()
    (tmp_path / "site/torchao/__init__.py").touch()
    install("torchao", "0.10.0")
    getattr(peft.import_utils.is_torchao_available, "cache_clear", lambda: None)()
    model = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    with pytest.raises(ImportError, match="incompatible version of torchao"):
        get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
