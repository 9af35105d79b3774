"""What a :class:`Trial` means for a run on this machine.

A card that torch cannot use is no problem by itself: the run goes on the CPU, and that is said. A card that
torch takes and cannot compute on is one.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from nbqlora.core.doctor import Check
from nbqlora.core.errors import DeviceError
from nbqlora.memory.cards import Machine
from nbqlora.memory.device import check_kernels
from nbqlora.memory.trial import Trial

NEW_TORCH = "choose a torch for this driver: https://pytorch.org/get-started/locally"
NEW_BITSANDBYTES = "pip install -U bitsandbytes"


def torch_check(trial: Trial, machine: Machine) -> Check:
    """Torch computes, on the card if there is one."""
    check = partial(Check, name="torch")
    if trial.error:
        advice = "install torch and bitsandbytes again, and see what importing them says"
        return check(status="problem", found=trial.error, advice=advice)
    if trial.torch_error:
        return check(status="problem", found=f"cannot be imported: {trial.torch_error}", advice="install torch again")
    if machine.card is None and not trial.has_cuda:
        return check(status="ok", found=f"{trial.torch}, on the CPU")
    name = machine.card.name if machine.card else "the card"
    if reason := unused_because(trial.torch, trial.built_for, machine):
        return check(status="warning", found=f"{reason}, so {name} is not used", advice=NEW_TORCH)
    if machine.capability:
        try:
            check_kernels(name, machine.capability, trial.arch_list, trial.torch)
        except DeviceError as error:
            return Check.of("torch", "problem", str(error))
    if trial.cuda_error:
        return check(
            status="problem" if trial.has_cuda else "warning",
            found=f"{trial.torch} does not compute on {name}: {trial.cuda_error}",
            advice="restart the kernel, or free the card" if "memory" in trial.cuda_error else NEW_TORCH,
        )
    return check(status="ok", found=f"{trial.torch} computes on {name}")


def unused_because(torch_version: str, built_for: str, machine: Machine) -> str:
    """Why torch finds no CUDA on a machine with a card, told from versions; "" when they do not say.

    Args:
        built_for: ``torch.version.cuda``, "" for a CPU build.
    """
    if not built_for:
        return f"torch {torch_version} was built without CUDA"
    driver = machine.driver
    if driver is None or driver.cuda is None or driver.cuda[0] >= int(built_for.partition(".")[0]):
        return ""
    has = f"{driver.cuda[0]}.{driver.cuda[1]}"
    return f"torch {torch_version} needs CUDA {built_for} and driver {driver.version} has {has}"


def bitsandbytes_check(trial: Trial, environ: Mapping[str, str] = os.environ) -> Check:
    """NF4 works where a run would use it."""
    check = partial(Check, name="bitsandbytes")
    if trial.error or trial.torch_error:
        return check(status="skipped", found="not tried: torch does not work")
    if trial.bitsandbytes_error:
        found = f"cannot be imported: {trial.bitsandbytes_error}"
        return check(status="problem", found=found, advice=f"{NEW_BITSANDBYTES}, or load_in_4bit = false")
    version = trial.bitsandbytes
    if trial.has_cuda and trial.native != "cuda":
        reason = trial.native_error.partition("\n")[0]
        found = f"{version} has no library for CUDA {trial.built_for}" + (f": {reason}" if reason else "")
        chosen = "unset BNB_CUDA_VERSION, which chose it" if "BNB_CUDA_VERSION" in environ else NEW_BITSANDBYTES
        return check(status="problem", found=found, advice=chosen)
    if trial.nf4_error:
        found = f"{version} cannot quantize: {trial.nf4_error}"
        return check(status="problem", found=found, advice=NEW_BITSANDBYTES)
    where = "the card" if trial.has_cuda and not trial.cuda_error else "the CPU"
    return check(status="ok", found=f"{version}, NF4 tried on {where}")


def triton_check(trial: Trial) -> Check:
    """Triton is there where there is a card."""
    if not trial.has_cuda:
        return Check(name="triton", status="skipped", found="not used on a CPU")
    if not trial.triton:
        advice = "pip install triton (Linux; torch's own wheels bring it)"
        return Check(name="triton", status="warning", found="not installed: plain torch is used instead", advice=advice)
    return Check(name="triton", status="ok", found=trial.triton)


def missing_native(built_for: str, environ: Mapping[str, str] = os.environ, folder: Path | None = None) -> str:
    """What bitsandbytes lacks for a torch built for that CUDA, told from its files; "" when it lacks nothing.

    Args:
        built_for: ``torch.version.cuda``.
        folder: where bitsandbytes is installed; by default it is looked up, without importing it.
    """
    if folder is None:
        spec = importlib.util.find_spec("bitsandbytes")
        if spec is None or spec.origin is None:
            return "bitsandbytes is not installed"
        folder = Path(spec.origin).parent
    if "BNB_CUDA_VERSION" in environ:  # the user has chosen one
        return ""
    names = [re.search(r"_cuda(\d\d)(\d)", p.name) for p in sorted(folder.glob("libbitsandbytes_cuda*"))]
    versions = [match.groups() for match in names if match]
    if any(major == built_for.partition(".")[0] for major, _ in versions):
        return ""
    has = ", ".join(f"{major}.{minor}" for major, minor in versions) or "none"
    return f"bitsandbytes has no library for CUDA {built_for}, which this torch was built for (it has {has})"
