"""Whether torch and bitsandbytes really work here: tried, in a process of their own.

Versions and file names do not tell. Kaggle's torch lists a P100 and fails at its first kernel; bitsandbytes
is imported without its CUDA library and fails at its first call. So a multiplication and one block of NF4
are computed where a run would compute them. In another process, because what is broken can end it, and
because the one that asks keeps its memory: here torch is not imported and CUDA not started.

Nearly all of the time is the two imports, which a run needs too: 2.6 s on two CPU cores (torch 2.13,
bitsandbytes 0.50.2), 12.6 s beside an H100 (torch 2.11), where bitsandbytes brings torch's compiler.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbqlora.core.plain import plain

TIMEOUT_SECONDS = 60.0
# Values between -1 and 1 in NF4: codes are at most 0.31 apart, and the scales are rounded once more.
NF4_ERROR = 0.2


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What happened.

    Args:
        error: the process itself failed; nothing else is known then.
        torch: its version, "" when it could not be imported (``torch_error`` says why).
        built_for: the CUDA that torch was built for; "" for a CPU build.
        has_cuda: torch found a card.
        arch_list: what torch has kernels for.
        cuda_error: why CUDA did not start, or why the multiplication failed.
        bitsandbytes: its version, "" when it could not be imported (``bitsandbytes_error`` says why).
        native: its compiled library: ``cuda``, ``cpu``, or "" for none.
        native_error: why there is none.
        nf4_error: why a block could not be quantized and restored.
        triton: its version, "" when it is not installed.
    """

    error: str = ""
    torch: str = ""
    torch_error: str = ""
    built_for: str = ""
    has_cuda: bool = False
    arch_list: tuple[str, ...] = ()
    cuda_error: str = ""
    bitsandbytes: str = ""
    bitsandbytes_error: str = ""
    native: str = ""
    native_error: str = ""
    nf4_error: str = ""
    triton: str = ""


def start_trial(environ: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    """Begin; close it with ``with``, read it with :func:`read_trial`."""
    known = os.environ if environ is None else environ
    paths = [str(Path(__file__).parents[2]), *filter(None, [known.get("PYTHONPATH")])]
    # Importing must not look for anything on the hub.
    env = {**known, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", __name__]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def read_trial(process: subprocess.Popen[str], timeout_seconds: float = TIMEOUT_SECONDS) -> Trial:
    """Wait for the end, at most so long; a process that hangs is ended."""
    try:
        out, err = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return Trial(error=f"importing torch and bitsandbytes took more than {timeout_seconds:.0f} s")
    lines = [line for line in out.splitlines() if line.startswith("{")]
    if process.returncode or not lines:
        last = (err.strip().splitlines() or ["no output"])[-1]
        return Trial(error=f"importing torch and bitsandbytes ended with status {process.returncode}: {last}")
    found = json.loads(lines[-1])
    return Trial(**{**found, "arch_list": tuple(found["arch_list"])})


def _tried() -> dict[str, Any]:
    found: dict[str, Any] = {"arch_list": []}
    if importlib.util.find_spec("triton") is not None:
        from importlib.metadata import version

        found["triton"] = version("triton")
    # Whatever a broken library raises is what is to be reported: no narrower class covers it.
    try:
        import torch
    except Exception as error:
        return {**found, "torch_error": _first_line(error)}
    found |= {"torch": torch.__version__, "built_for": torch.version.cuda or "", "has_cuda": torch.cuda.is_available()}
    if found["built_for"]:
        found |= _try_cuda(torch)
    try:
        import bitsandbytes
        from bitsandbytes import cextension
    except Exception as error:
        return {**found, "bitsandbytes_error": _first_line(error)}
    found["bitsandbytes"] = bitsandbytes.__version__
    library = cextension.lib
    found["native_error"] = str(getattr(library, "error_msg", "")) if "Mock" in type(library).__name__ else ""
    if not found["native_error"]:
        found["native"] = "cuda" if library.compiled_with_cuda else "cpu"
    works_on_card = found["has_cuda"] and not found.get("cuda_error")
    return {**found, "nf4_error": _try_nf4(torch, "cuda" if works_on_card else "cpu")}


def _try_cuda(torch: Any) -> dict[str, Any]:
    found: dict[str, Any] = {"arch_list": torch.cuda.get_arch_list()}
    try:
        ones = torch.ones(64, 64, device="cuda")
        (ones @ ones).sum().item()
    except Exception as error:
        found["cuda_error"] = _first_line(error)
    return found


def _try_nf4(torch: Any, device: str) -> str:
    from bitsandbytes import functional

    try:
        weights = torch.linspace(-1, 1, 64 * 64, device=device, dtype=torch.float16).reshape(64, 64)
        packed, state = functional.quantize_4bit(weights, compress_statistics=True, quant_type="nf4")
        error = (functional.dequantize_4bit(packed, state) - weights).abs().max().item()
    except Exception as failure:
        return _first_line(failure)
    return "" if error < NF4_ERROR else f"a block came back with an error of {error:.2f}"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


if __name__ == "__main__":
    sys.stdout.write(json.dumps(plain(_tried())) + "\n")
