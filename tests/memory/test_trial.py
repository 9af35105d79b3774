"""Whether torch and bitsandbytes work: tried for real here, and with broken ones in their place."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from nbqlora.core.doctor import Check
from nbqlora.memory.cards import Driver, Machine
from nbqlora.memory.nvml import Card
from nbqlora.memory.trial import Trial, read_trial, start_trial
from nbqlora.memory.working import bitsandbytes_check, missing_native, torch_check, triton_check

GIB = 1 << 30
T4 = Card(uuid="", name="Tesla T4", total_bytes=15 * GIB, free_bytes=14 * GIB, n_cards=1, own_bytes=0, others_bytes=0)
DRIVER = Driver(version="550.54.15", cuda=(12, 4), names=("Tesla T4",), capability=(7, 5))
WITH_T4 = Machine(card=T4, why="", driver=DRIVER, has_driver=True)
CPU = Machine(card=None, why="NVML knows no card", driver=None, has_driver=False)
GOOD = Trial(
    torch="2.11.0+cu128",
    built_for="12.8",
    has_cuda=True,
    arch_list=("sm_75", "sm_80", "sm_90"),
    bitsandbytes="0.50.2",
    native="cuda",
    triton="3.6.0",
)


def tried(site: Path, *, timeout_seconds: float = 60, **modules: str) -> Trial:
    """A trial in which these modules stand before the real ones."""
    for name, code in modules.items():
        (site / f"{name}.py").write_text(code)
    with start_trial({**os.environ, "PYTHONPATH": str(site)}) as process:
        return read_trial(process, timeout_seconds)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="CPU wheels differ elsewhere")
def test_this_machine_works(tmp_path: Path) -> None:
    trial = tried(tmp_path)
    assert trial.torch and trial.bitsandbytes
    assert trial.native in ("cpu", "cuda")
    assert not [e for e in (trial.error, trial.torch_error, trial.cuda_error, trial.bitsandbytes_error) if e]
    assert trial.nf4_error == ""


def test_the_process_that_asks_imports_neither(tmp_path: Path) -> None:
    code = "import sys, nbqlora.memory.trial, nbqlora.memory.working, nbqlora.run.doctor\n"
    code += "assert not {'torch', 'bitsandbytes', 'transformers', 'IPython'} & set(sys.modules)"
    import subprocess

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_torch_that_cannot_be_imported_is_reported(tmp_path: Path) -> None:
    trial = tried(tmp_path, torch="raise OSError('libcudart.so.13: cannot open shared object file\\nmore')")
    assert trial.torch_error == "OSError: libcudart.so.13: cannot open shared object file"
    assert torch_check(trial, CPU) == Check(
        name="torch",
        status="problem",
        found="cannot be imported: OSError: libcudart.so.13: cannot open shared object file",
        advice="install torch again",
    )
    assert bitsandbytes_check(trial).status == "skipped"


def test_a_bitsandbytes_that_cannot_be_imported_is_reported(tmp_path: Path) -> None:
    trial = tried(tmp_path, bitsandbytes="raise ImportError('no module named scipy')")
    assert (trial.torch_error, trial.bitsandbytes_error) == ("", "ImportError: no module named scipy")
    assert str(bitsandbytes_check(trial)) == (
        "cannot be imported: ImportError: no module named scipy; pip install -U bitsandbytes, or load_in_4bit = false"
    )


def test_a_library_that_ends_its_process_ends_only_the_trial(tmp_path: Path) -> None:
    trial = tried(tmp_path, torch="import os, sys; print('illegal instruction', file=sys.stderr); os._exit(132)")
    assert trial == Trial(error="importing torch and bitsandbytes ended with status 132: illegal instruction")
    assert torch_check(trial, CPU).status == "problem"


def test_a_library_that_hangs_is_given_up(tmp_path: Path) -> None:
    trial = tried(tmp_path, torch="import time; time.sleep(60)", timeout_seconds=1)
    assert trial == Trial(error="importing torch and bitsandbytes took more than 1 s")


def test_what_a_library_prints_does_not_disturb(tmp_path: Path) -> None:
    assert tried(tmp_path, torch="print('hello'); raise ImportError('x')").torch_error == "ImportError: x"


def test_all_is_well_on_a_card() -> None:
    assert torch_check(GOOD, WITH_T4) == Check(name="torch", status="ok", found="2.11.0+cu128 computes on Tesla T4")
    assert bitsandbytes_check(GOOD) == Check(name="bitsandbytes", status="ok", found="0.50.2, NF4 tried on the card")
    assert triton_check(GOOD) == Check(name="triton", status="ok", found="3.6.0")


def test_a_p100_is_a_problem_with_another_card_as_its_advice() -> None:
    p100 = Machine(
        card=replace(T4, name="Tesla P100-PCIE-16GB"),
        why="",
        driver=replace(DRIVER, capability=(6, 0)),
        has_driver=True,
    )
    no_kernel = "RuntimeError: CUDA error: no kernel image is available for execution on the device"
    check = torch_check(replace(GOOD, cuda_error=no_kernel), p100)
    assert check.status == "problem"
    assert str(check) == (
        "Tesla P100-PCIE-16GB has compute capability 6.0, for which this torch (2.11.0+cu128: sm_75, sm_80, sm_90) "
        "has no kernels; on Kaggle choose Settings > Accelerator > GPU T4 x2"
    )


@pytest.mark.parametrize(
    ("trial", "status", "said"),
    [
        (
            replace(GOOD, torch="2.13.0+cpu", built_for="", has_cuda=False),
            "warning",
            "torch 2.13.0+cpu was built without CUDA, so Tesla T4 is not used; "
            "choose a torch for this driver: https://pytorch.org/get-started/locally",
        ),
        (
            replace(GOOD, torch="2.13.0+cu130", built_for="13.0", has_cuda=False),
            "warning",
            "torch 2.13.0+cu130 needs CUDA 13.0 and driver 550.54.15 has 12.4, so Tesla T4 is not used; "
            "choose a torch for this driver: https://pytorch.org/get-started/locally",
        ),
        (
            replace(GOOD, cuda_error="OutOfMemoryError: CUDA out of memory"),
            "problem",
            "2.11.0+cu128 does not compute on Tesla T4: OutOfMemoryError: CUDA out of memory; "
            "restart the kernel, or free the card",
        ),
        (
            replace(GOOD, has_cuda=False, cuda_error="RuntimeError: no NVIDIA driver"),
            "warning",
            "2.11.0+cu128 does not compute on Tesla T4: RuntimeError: no NVIDIA driver; "
            "choose a torch for this driver: https://pytorch.org/get-started/locally",
        ),
    ],
)
def test_why_torch_does_not_use_the_card(trial: Trial, status: str, said: str) -> None:
    check = torch_check(trial, WITH_T4)
    assert (check.status, str(check)) == (status, said)


@pytest.mark.parametrize(
    ("trial", "said"),
    [
        (
            replace(GOOD, native="", native_error="No compatible CUDA binary found at x.so"),
            "0.50.2 has no library for CUDA 12.8: No compatible CUDA binary found at x.so; pip install -U bitsandbytes",
        ),
        (replace(GOOD, native="cpu"), "0.50.2 has no library for CUDA 12.8; pip install -U bitsandbytes"),
        (
            replace(GOOD, nf4_error="RuntimeError: illegal memory access"),
            "0.50.2 cannot quantize: RuntimeError: illegal memory access; pip install -U bitsandbytes",
        ),
    ],
)
def test_why_bitsandbytes_cannot_be_used(trial: Trial, said: str) -> None:
    check = bitsandbytes_check(trial, {})
    assert (check.status, str(check)) == ("problem", said)


def test_a_cuda_version_that_was_chosen_by_hand_is_named() -> None:
    check = bitsandbytes_check(replace(GOOD, native="cpu"), {"BNB_CUDA_VERSION": "999"})
    assert check.advice == "unset BNB_CUDA_VERSION, which chose it"


def test_triton_counts_only_where_there_is_a_card() -> None:
    assert triton_check(replace(GOOD, triton="")).status == "warning"
    assert triton_check(replace(GOOD, has_cuda=False, triton="")).status == "skipped"


def test_bitsandbytes_files_tell_which_cuda_it_lacks(tmp_path: Path) -> None:
    for name in ("cuda118", "cuda126", "cuda128", "cpu", "rocm72"):
        (tmp_path / f"libbitsandbytes_{name}.so").touch()
    assert missing_native("12.9", {}, tmp_path) == missing_native("11.8", {}, tmp_path) == ""
    assert missing_native("13.0", {}, tmp_path) == (
        "bitsandbytes has no library for CUDA 13.0, which this torch was built for (it has 11.8, 12.6, 12.8)"
    )
    assert missing_native("13.0", {"BNB_CUDA_VERSION": "128"}, tmp_path) == ""


def test_the_installed_bitsandbytes_is_looked_up() -> None:
    assert "bitsandbytes" not in missing_native("12.8", {})
    assert "CUDA 9.2" in missing_native("9.2", {})
