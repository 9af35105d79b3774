"""Launches shared among processes: each kernel, as it is compiled, is somebody's; afterwards everything is launched."""

from __future__ import annotations

import pytest
import torch

from nbqlora.kernels._launch import HAS_TRITON, launches_of_a_share
from nbqlora.kernels.glu import glu_triton
from nbqlora.kernels.low_rank_add import low_rank_add_triton
from nbqlora.kernels.rms_norm import rms_norm_triton
from tests.kernels.truth import DEVICE, normal

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="nothing is launched without triton")


def launched() -> list[bool]:
    """Which of these calls wrote something: three kernels, the first of them twice."""
    outs = []
    for kind, dtype in (
        ("norm", torch.float32),
        ("norm", torch.float16),
        ("glu", torch.float32),
        ("norm", torch.float32),
    ):
        x = normal(4, 64, dtype=dtype)
        out = torch.full_like(x, 77.0)
        if kind == "norm":
            rms_norm_triton(x, torch.ones(64, dtype=dtype, device=DEVICE), 1e-5, style="llama", out=out)
        else:
            glu_triton(x, x, activation="silu", out=out)
        outs.append(bool((out != 77.0).all()))
    return outs


def test_every_kernel_is_somebodys() -> None:
    shares = []
    for number in range(2):
        with launches_of_a_share(number, 2):
            shares.append(launched())
    assert shares == [[True, False, True, True], [False, True, False, False]]
    assert launched() == [True] * 4


def test_more_processes_than_kernels() -> None:
    with launches_of_a_share(4, 5):
        assert launched() == [False] * 4


def test_another_number_of_rows_is_the_same_kernel() -> None:
    with launches_of_a_share(1, 2):
        for rows in (16, 29, 1):
            x = normal(rows, 64, dtype=torch.float32)
            out = torch.full_like(x, 77.0)
            rms_norm_triton(x, torch.ones(64, device=DEVICE), 1e-5, style="llama", out=out)
            assert bool((out == 77.0).all())
    with launches_of_a_share(1, 2):
        for rows in (16, 29, 1):
            u, b = normal(rows, 4, dtype=torch.float32), normal(64, 4, dtype=torch.float32)
            out = torch.full((rows, 64), 77.0, device=DEVICE)
            low_rank_add_triton(out, u, b, out=out)
            assert bool((out == 77.0).all())


def test_all_are_launched_again_behind_an_error() -> None:
    with pytest.raises(RuntimeError, match="no room"), launches_of_a_share(1, 2):
        raise RuntimeError("no room")
    assert launched() == [True] * 4
