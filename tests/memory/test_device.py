"""The machine as a plan sees it, and the peak of a stretch of work."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nbqlora.core.errors import DeviceError, NbqloraError
from nbqlora.memory.device import _start_cuda, check_kernels, context_bytes, device_spec, kernels_cover
from nbqlora.memory.matmul import measure_matmul_flops
from nbqlora.memory.nvml import Card
from nbqlora.memory.peak import PeakMeter

MIB = 1 << 20
COLAB = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
on_a_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a card")


@pytest.mark.parametrize(
    ("arch_list", "capability", "expected"),
    [
        (COLAB, (7, 5), True),
        (COLAB, (6, 0), False),
        (COLAB, (7, 0), False),  # code for 7.5 does not run on 7.0
        (COLAB, (8, 9), True),
        (COLAB, (9, 0), True),
        (COLAB, (10, 3), True),
        (COLAB, (11, 0), False),  # no 11.x code, and the PTX is newer
        (COLAB, (12, 1), True),
        (COLAB, (13, 0), True),  # from PTX
        (["sm_86"], (8, 0), False),
        (["compute_70"], (9, 0), True),
        (["compute_90a"], (10, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_100f"], (10, 3), True),
        (["compute_100f"], (12, 0), False),
        ([], (6, 0), True),
        (["gfx90a", "gfx942"], (9, 4), True),
    ],
)
def test_which_cards_a_build_runs_on(arch_list: list[str], capability: tuple[int, int], expected: bool) -> None:
    assert kernels_cover(arch_list, capability) is expected


def test_the_message_for_an_old_card() -> None:
    with pytest.raises(DeviceError) as caught:
        check_kernels("Tesla P100-PCIE-16GB", (6, 0), ["sm_75", "sm_80"], "2.11.0+cu128")
    assert isinstance(caught.value, NbqloraError) and isinstance(caught.value, RuntimeError)
    assert str(caught.value) == (
        "Tesla P100-PCIE-16GB has compute capability 6.0, for which this torch (2.11.0+cu128: sm_75, sm_80) "
        "has no kernels; on Kaggle choose Settings > Accelerator > GPU T4 x2"
    )


def test_the_message_for_a_new_card() -> None:
    with pytest.raises(DeviceError) as caught:
        check_kernels("NVIDIA GeForce RTX 5090", (12, 0), ["sm_90"], "2.6.0+cu124")
    assert str(caught.value) == (
        "NVIDIA GeForce RTX 5090 has compute capability 12.0, for which this torch (2.6.0+cu124: sm_90) "
        "has no kernels; install a torch that was built for it"
    )


@pytest.mark.parametrize("known", [True, False])
def test_the_message_for_a_card_without_room(known: bool) -> None:
    def init() -> None:
        raise RuntimeError("CUDA error: out of memory\nlong advice")

    full = Card(
        uuid="",
        name="Tesla T4",
        total_bytes=15 << 30,
        free_bytes=90 * MIB,
        n_cards=1,
        own_bytes=None,
        others_bytes=None,
    )
    with pytest.raises(DeviceError) as caught:
        _start_cuda(SimpleNamespace(cuda=SimpleNamespace(init=init)), full if known else None)
    where = " on Tesla T4, 0.09 GiB of which are free" if known else ""
    message = f"CUDA does not start{where}: CUDA error: out of memory; restart the kernel, or free the card"
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("reserved", "own", "before", "after", "expected"),
    [
        (20, 320, None, 0, 300),
        (20, 320, 900, 100, 300),  # the process's own figure goes before the difference
        (20, None, 900, 600, 280),
        (20, 10, 900, 600, 280),  # somebody else's figure
        (20, None, 900, 890, 0),  # others freed memory meanwhile
        (20, None, None, 600, None),
    ],
)
def test_context(reserved: int, own: int | None, before: int | None, after: int, expected: int | None) -> None:
    measured = context_bytes(reserved_bytes=reserved, own_bytes=own, free_before_bytes=before, free_after_bytes=after)
    assert measured == expected


@on_a_cpu
def test_this_machine(tmp_path: Path) -> None:
    spec = device_spec(tmp_path / "runs/run1")
    assert spec.kind == "cpu" and "CPU core" in spec.name
    assert 0 < spec.context_bytes < spec.total_bytes
    assert 0 < spec.free_bytes == spec.host_free_bytes < spec.total_bytes
    assert spec.disk_free_bytes > 0 and spec.n_devices == 1
    assert spec.matmul_flops is not None and 1e9 < spec.matmul_flops < 1e14
    assert (spec.capability, spec.has_bf16, spec.has_triton) == (None, False, False)


def test_measuring_leaves_the_seed_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    measure_matmul_flops("cpu", "fp32")
    assert torch.equal(torch.rand(3), expected)


def touched(n_bytes: int) -> bytearray:
    return bytearray(b"x") * n_bytes


def test_a_peak_shorter_than_the_interval_is_seen() -> None:
    code = """
from nbqlora.memory.peak import PeakMeter
meter = PeakMeter("cpu")
for n_mib in (128, 256, 384):  # each higher than all before it in this process
    meter.start()
    before = meter.read()
    bytearray(b"x") * (n_mib << 20)
    meter.stop()
    assert before + (n_mib - 16 << 20) < meter.read() < before + (n_mib + 32 << 20), (before, n_mib, meter.read())
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_peak_below_an_earlier_one_is_sampled() -> None:
    earlier = touched(512 * MIB)
    del earlier
    meter = PeakMeter("cpu")
    meter.start()
    before = meter.read()
    held = touched(256 * MIB)
    time.sleep(0.2)
    del held
    meter.stop()
    assert before + 240 * MIB < meter.read() < before + 400 * MIB


def test_a_meter_stands_still_after_stop_and_starts_again() -> None:
    meter = PeakMeter("cpu")
    assert meter.read() == 0
    meter.stop()
    meter.start()
    meter.stop()
    first = meter.read()
    held = touched(128 * MIB)
    assert meter.read() == first
    meter.start()
    meter.stop()
    assert meter.read() >= first + 100 * MIB
    del held
