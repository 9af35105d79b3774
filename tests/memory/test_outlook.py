"""The machine as a plan would find it, without starting CUDA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nbqlora.core.errors import DeviceError
from nbqlora.memory.outlook import CONTEXT_BYTES, device_outlook

GIB = 1 << 30
UseNvml = Callable[..., None]
without_card = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a card")


@pytest.fixture
def cuda_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)


@pytest.mark.parametrize(
    ("capability", "has_bf16", "has_triton"),
    [((7, 5), False, True), ((6, 0), False, False), ((9, 0), True, True)],
)
def test_before_cuda_the_driver_answers(
    use_nvml: UseNvml, cuda_build: None, tmp_path: Path, capability: tuple[int, int], has_bf16: bool, has_triton: bool
) -> None:
    use_nvml({"uuid": "GPU-a", "used": 2 * GIB, "capability": capability})
    spec = device_outlook(tmp_path)
    assert (spec.kind, spec.name, spec.capability) == ("cuda", "Tesla T4", capability)
    assert (spec.has_bf16, spec.has_triton, spec.matmul_flops) == (has_bf16, has_triton, None)
    assert spec.free_bytes == 15 * GIB - GIB // 4 - 2 * GIB - CONTEXT_BYTES
    assert spec.notes[-1] == "CUDA is not started: its context is counted as 0.59 GiB"


def test_a_card_that_nobody_knows(use_nvml: UseNvml, cuda_build: None, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml(init_error="Driver Not Loaded")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError) as caught:
        device_outlook()
    assert str(caught.value) == (
        "there is a card, but how much of it is free cannot be known before CUDA is started: NVML: Driver Not Loaded; "
        "run torch.cuda.init() in a cell, then ask again"
    )


@without_card
def test_without_a_card_it_is_the_cpu(tmp_path: Path) -> None:
    spec = device_outlook(tmp_path, given_back_bytes=GIB)
    assert spec.kind == "cpu" and spec.free_bytes == spec.host_free_bytes
    assert not torch.cuda.is_initialized()
