"""The probe on a real card. Each stage runs in its own process, since CUDA can be started only once."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

torch = pytest.importorskip("torch")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]
needs_nvml = pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="needs nvidia-ml-py")

MIB = 1 << 20
GIB = 1 << 30


def in_a_new_process(code: str) -> Any:
    """Run ``code``, which sets ``out``, and return that."""
    code = f"import json, sys\n{code}\nprint(json.dumps(out))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    print(done.stdout, done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def check_sums(report: dict[str, Any]) -> None:
    assert sum(report["by_category"].values()) == report["used_bytes"]
    assert report["used_bytes"] + report["free_bytes"] == report["total_bytes"]
    assert min(report["by_category"].values()) >= 0


@needs_nvml
@pytest.mark.parametrize("before", ["", "import torch"])
def test_before_cuda_nvml_answers_and_starts_nothing(before: str) -> None:
    report, started = in_a_new_process(f"""
{before}
from nbqlora.memory.probe import vram
report = vram()
torch = sys.modules.get("torch")
out = report.as_dict(), torch is not None and torch.cuda.is_initialized()
""")
    assert not started
    assert (report["kind"], report["measured_by"], report["peak_bytes"]) == ("cuda", "nvml", 0)
    assert report["total_bytes"] > GIB
    check_sums(report)


def test_without_nvml_before_cuda_it_says_why_there_is_no_card() -> None:
    report = in_a_new_process("""
sys.modules["pynvml"] = None
from nbqlora.memory.probe import vram
out = vram().as_dict()
""")
    assert (report["kind"], report["measured_by"]) == ("cpu", "os")
    check_sums(report)


@pytest.mark.parametrize("hide_nvml", [False, True])
def test_with_cuda_torch_answers(hide_nvml: bool) -> None:
    reports = in_a_new_process(f"""
if {hide_nvml}:
    sys.modules["pynvml"] = None
import time, torch
from nbqlora.core.specs import MemoryCategory
from nbqlora.memory.probe import vram
held = torch.ones(256 << 20, dtype=torch.uint8, device="cuda")
cached = torch.ones(128 << 20, dtype=torch.uint8, device="cuda")
del cached
vram()
start = time.perf_counter()
plain = vram()
seconds = time.perf_counter() - start
out = plain.as_dict(), vram(holdings={{MemoryCategory.WEIGHTS: 200 << 20}}).as_dict(), seconds
""")
    plain, told, seconds = reports
    assert seconds < 0.05
    for report in (plain, told):
        assert (report["kind"], report["measured_by"]) == ("cuda", "torch")
        check_sums(report)
    assert plain["by_category"]["this_process"] == 256 * MIB
    assert plain["by_category"]["cache"] == 128 * MIB
    assert plain["by_category"]["context"] > 50 * MIB
    assert plain["peak_bytes"] == 384 * MIB
    assert told["by_category"]["weights"] == 200 * MIB
    assert told["by_category"]["this_process"] == 56 * MIB


@needs_nvml
def test_nvml_and_torch_agree_on_the_total() -> None:
    by_nvml, by_torch, same_card = in_a_new_process("""
import torch
from nbqlora.memory.nvml import read_card
from nbqlora.memory.probe import card_uuid
before = read_card()[0]
torch.cuda.init()
after = read_card(card_uuid(torch.cuda, torch.cuda.current_device()))[0]
out = before.total_bytes, torch.cuda.mem_get_info()[1], after is not None and after.uuid == before.uuid
""")
    assert same_card
    assert abs(by_nvml - by_torch) < 0.03 * by_torch


DEVICE = """
import torch
started = %s
if started:
    torch.ones(1, device="cuda")
from nbqlora.memory.device import device_spec
spec = device_spec()
out = {**vars(spec), "reserved": torch.cuda.memory_reserved(), "free_now": torch.cuda.mem_get_info()[0]}
"""


@needs_nvml
def test_a_fresh_device_spec_measures_the_context() -> None:
    spec = in_a_new_process(DEVICE % False)
    assert spec["kind"] == "cuda"
    assert 50 * MIB < spec["context_bytes"] < 2 * GIB
    assert spec["context_bytes"] < spec["free_bytes"] <= spec["total_bytes"]
    assert spec["free_bytes"] <= spec["free_now"] + spec["reserved"]
    assert spec["has_bf16"] == (tuple(spec["capability"]) >= (8, 0))
    assert spec["matmul_flops"] > 5e12
    assert spec["n_devices"] == torch.cuda.device_count()


def test_a_device_spec_after_cuda_started_knows_the_context_or_says_that_it_does_not() -> None:
    spec = in_a_new_process(DEVICE % True)
    unknown = any(note.startswith("size of the CUDA context not known") for note in spec["notes"])
    assert unknown == (spec["context_bytes"] == 0)
    assert spec["matmul_flops"] > 5e12


def test_this_torch_has_kernels_for_this_card() -> None:
    from nbqlora.core.errors import DeviceError
    from nbqlora.memory.device import check_kernels

    arch_list = torch.cuda.get_arch_list()
    check_kernels("this card", torch.cuda.get_device_capability(), arch_list, torch.__version__)
    with pytest.raises(DeviceError, match=r"compute capability 3\.0.*has no kernels"):
        check_kernels("an old card", (3, 0), arch_list, torch.__version__)


def test_the_meter_catches_an_allocation_that_is_gone() -> None:
    from nbqlora.memory.peak import PeakMeter

    meter = PeakMeter("cuda")
    held = torch.ones(16 * MIB, dtype=torch.uint8, device="cuda")
    before = torch.cuda.memory_allocated()
    meter.start()
    del held
    block = torch.ones(256 * MIB, dtype=torch.uint8, device="cuda")
    del block
    assert meter.read() == before + 240 * MIB
    meter.stop()
    more = torch.ones(512 * MIB, dtype=torch.uint8, device="cuda")
    del more
    assert meter.read() == before + 240 * MIB
