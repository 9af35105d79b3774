"""The card, its driver and what hides it, through a stand-in for NVML."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest

from nbqlora.core.doctor import Check
from nbqlora.memory import cards
from nbqlora.memory.cards import card_check, read_machine

GIB = 1 << 30
UseNvml = Callable[..., None]
T4 = {"uuid": "GPU-aa11"}
SECOND = {"uuid": "GPU-aa22"}


@pytest.fixture
def driver(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``driver(*cards)``: those cards under driver 550.54.15, which runs CUDA 12.4."""

    def install(*given: dict[str, Any], capability: tuple[int, int] = (7, 5), **keywords: Any) -> Any:
        use_nvml(*given, **keywords)
        nvml: Any = sys.modules["pynvml"]
        nvml.nvmlSystemGetDriverVersion = lambda: "550.54.15"
        nvml.nvmlSystemGetCudaDriverVersion_v2 = lambda: 12040
        nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: capability
        return nvml

    return install


def checked(environ: dict[str, str] | None = None, get_a_card: str = "") -> Check:
    return card_check(read_machine(), environ or {}, cpu="2 CPU cores", get_a_card=get_a_card)


def test_a_card_with_its_driver(driver: Callable[..., Any]) -> None:
    driver(T4)
    assert checked() == Check(
        name="card",
        status="ok",
        found="Tesla T4, capability 7.5, 14.8 GiB of 14.8 GiB free, driver 550.54.15 (CUDA 12.4)",
    )
    machine = read_machine()
    assert machine.driver is not None
    assert (machine.capability, machine.driver.cuda) == ((7, 5), (12, 4))


def test_what_a_driver_does_not_say_is_left_out(driver: Callable[..., Any]) -> None:
    nvml = driver(T4)

    def fail(*_: Any) -> Any:
        raise nvml.NVMLError("Not Supported")

    nvml.nvmlSystemGetCudaDriverVersion_v2 = nvml.nvmlDeviceGetCudaComputeCapability = fail
    assert checked().found == "Tesla T4, 14.8 GiB of 14.8 GiB free, driver 550.54.15"


def test_of_two_cards_the_first_is_taken(driver: Callable[..., Any]) -> None:
    driver(T4, SECOND)
    assert checked().found.endswith('; 2 cards, a run takes the first, or with gpus = "all" each of them')


def test_a_variable_that_hides_some_cards_is_named(driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(T4, SECOND)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    check = checked({"CUDA_VISIBLE_DEVICES": "1"})
    assert (check.status, check.found.partition("; ")[2]) == (
        "ok",
        "1 of 2 cards visible: CUDA_VISIBLE_DEVICES = '1'",
    )


def test_a_variable_that_hides_every_card_is_a_warning(
    driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(T4, SECOND)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    check = checked({"CUDA_VISIBLE_DEVICES": ""})
    assert check.status == "warning"
    assert str(check) == (
        "CUDA_VISIBLE_DEVICES = '' hides all 2 cards (Tesla T4); unset it and restart the kernel, to use a card"
    )


@pytest.mark.parametrize(
    ("own", "advice"),
    [
        (True, "this process holds 13.0 GiB: restart the kernel"),
        (False, "another program holds the rest: nvidia-smi names it"),
    ],
)
def test_a_full_card_says_who_fills_it(driver: Callable[..., Any], own: bool, advice: str) -> None:
    import os

    driver({**T4, "used": 13 * GIB, "processes": {os.getpid() if own else 1: 13 * GIB}})
    check = checked()
    assert (check.status, check.advice) == ("warning", advice)


def test_a_driver_that_fails_is_a_warning(driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driver(init_error="Driver/library version mismatch")
    monkeypatch.setattr(cards, "DRIVER_FILE", cards.Path("/proc"))
    check = checked()
    assert check.status == "warning"
    assert str(check) == (
        "a driver, but no card to be seen: NVML: Driver/library version mismatch; see what nvidia-smi says"
    )


def test_a_driver_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(cards, "DRIVER_FILE", cards.Path("/proc"))
    check = checked()
    assert str(check) == ("a driver, but no card to be seen: nvidia-ml-py is not installed; pip install nvidia-ml-py")


def test_a_machine_without_a_card_takes_its_cpu(driver: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    driver()
    monkeypatch.setattr(cards, "DRIVER_FILE", cards.Path("/nowhere"))
    assert checked() == Check(name="card", status="ok", found="none: a run takes the CPU (2 CPU cores)")
    check = checked(get_a_card="Runtime > Change runtime type > T4 GPU gives one")
    assert (check.status, check.advice) == ("warning", "Runtime > Change runtime type > T4 GPU gives one")
