"""The doctor on a real card: what is tried works, and the process that asks stays as it was."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pynvml")
pytest.importorskip("bitsandbytes")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card"),
]

from nbqlora.core.errors import DeviceError  # noqa: E402
from nbqlora.memory.cards import card_check, read_machine  # noqa: E402
from nbqlora.memory.trial import read_trial, start_trial  # noqa: E402
from nbqlora.memory.working import bitsandbytes_check, missing_native, torch_check, triton_check  # noqa: E402
from nbqlora.run.preflight import check_card  # noqa: E402


def test_a_card_is_tried_in_another_process(capsys: pytest.CaptureFixture[str]) -> None:
    started = torch.cuda.is_initialized()
    with start_trial() as process:
        trial = read_trial(process)
    machine = read_machine()
    checks = [card_check(machine, os.environ, cpu="?"), torch_check(trial, machine), bitsandbytes_check(trial)]
    with capsys.disabled():
        print(*checks, triton_check(trial), sep="\n")
    assert [c.status for c in checks] == ["ok"] * 3
    assert (trial.native, trial.has_cuda, trial.cuda_error, trial.nf4_error) == ("cuda", True, "", "")
    assert torch.cuda.is_initialized() == started


def test_nvml_and_torch_agree_on_the_capability() -> None:
    machine = read_machine()
    assert machine.capability == torch.cuda.get_device_capability(0)
    assert machine.driver is not None and machine.driver.cuda is not None
    assert machine.driver.cuda[0] >= int((torch.version.cuda or "0").partition(".")[0])


def test_preflight_passes_this_card_and_refuses_what_its_torch_cannot_run() -> None:
    arches, built_for = torch.cuda.get_arch_list(), torch.version.cuda
    check_card(read_machine(), arches, built_for, load_in_4bit=True)
    assert missing_native(built_for) == ""
    with pytest.raises(DeviceError, match="has no kernels"):
        check_card(read_machine(), ["sm_50"], built_for, load_in_4bit=True)


@pytest.mark.parametrize("fault", ["no library", "hidden"])
def test_faults_on_a_card_are_seen(fault: str) -> None:
    environ = dict(os.environ)
    environ |= {"BNB_CUDA_VERSION": "999"} if fault == "no library" else {"CUDA_VISIBLE_DEVICES": ""}
    with start_trial(environ) as process:
        trial = read_trial(process)
    if fault == "no library":
        check = bitsandbytes_check(trial)
        assert check.status == "problem" and "has no library for CUDA" in check.found
    else:
        assert not trial.has_cuda and bitsandbytes_check(trial).found.endswith("NF4 tried on the CPU")
