"""Whether a model fits, asked without weights: on machines that are not there, and on this one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from nbqlora.core.errors import ConfigError
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import DeviceSpec
from nbqlora.run.fit import fit

GIB = 1 << 30
ASSUMED = "assumed: rows as long as max_length, all learned; data = ... makes it exact"


def card(free_gib: float) -> DeviceSpec:
    return DeviceSpec(
        kind="cuda", name="a card", total_bytes=16 * GIB, free_bytes=int(free_gib * GIB), context_bytes=0,
        host_free_bytes=8 * GIB, disk_free_bytes=99 * GIB, capability=(7, 5), has_triton=True, notes=("a note",),
    )  # fmt: skip


def asked(folder: Path, **options: Any) -> CellRequest:
    return CellRequest(options={"model": str(folder), **options})


def test_it_fits(tiny_folder: Path) -> None:
    found = fit(asked(tiny_folder, max_length=256), card(14))
    assert found.fits and found.plan is not None
    assert found.plan.data.percentiles == (256,) * 5 and found.plan.dtype == "fp16"
    assert [line.partition(":")[0] for line in found.lines] == [
        *(d.name for d in found.plan.decisions if d.name in ("batch", "layers", "MLP", "host RAM", "memory")),
        "assumed",
        "a note",
    ]
    assert found.lines[-2] == ASSUMED


def test_it_does_not_and_what_would(tiny_folder: Path) -> None:
    found = fit(asked(tiny_folder, max_length=100_000, vram_gib=0.12), card(14))
    assert not found.fits
    assert found.lines[0].startswith(f"{tiny_folder} needs ") and found.lines[0].endswith("has 0.12 GiB usable")
    (change,) = [line for line in found.lines if line.startswith("it fits with max_length = ")]
    tokens = int(change.split("=")[1].split(",")[0].split()[0])
    assert fit(asked(tiny_folder, max_length=tokens, vram_gib=0.12), card(14)).fits
    assert ASSUMED in found.lines


def test_real_rows_make_it_exact(tiny_folder: Path, tiny_rows: Any) -> None:
    found = fit(asked(tiny_folder, data=tiny_rows), card(14))
    assert found.plan is not None and found.plan.data.n_rows == 12
    assert ASSUMED not in found.lines


def test_problems_are_told_together(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="2 problems"):
        fit(asked(tiny_folder, lora_rank=3, max_length=-3), card(14))


def test_on_this_machine_nothing_is_loaded(tiny_folder: Path) -> None:
    started = torch.cuda.is_initialized()
    found = fit(asked(tiny_folder, max_length=64))
    assert found.fits and torch.cuda.is_initialized() == started
