"""A stand-in for ``pynvml``: cards and processes that no test machine has."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

GIB = 1 << 30


class NVMLError(Exception):
    pass


@dataclass
class FakeCard:
    uuid: str
    name: str = "Tesla T4"
    total: int = 15 * GIB
    reserved: int = GIB // 4
    used: int = 0
    processes: Mapping[int, int | None] = field(default_factory=dict)
    capability: tuple[int, int] = (7, 5)


def fake_pynvml(*cards: FakeCard, init_error: str = "", has_v2: bool = True) -> Any:
    nvml: Any = ModuleType("pynvml")

    def init() -> None:
        if init_error:
            raise NVMLError(init_error)

    def by_uuid(uuid: str) -> FakeCard:
        for card in cards:
            if card.uuid == uuid:
                return card
        raise NVMLError("Not Found")

    def memory(card: FakeCard, version: int | None = None) -> SimpleNamespace:
        free = card.total - card.reserved - card.used
        return SimpleNamespace(total=card.total, free=free, reserved=card.reserved)

    def processes(card: FakeCard) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=pid, usedGpuMemory=n) for pid, n in card.processes.items()]

    def graphics(card: FakeCard) -> list[SimpleNamespace]:
        raise NVMLError("Not Supported")

    nvml.NVMLError = NVMLError
    nvml.nvmlInit = init
    nvml.nvmlDeviceGetCount = lambda: len(cards)
    nvml.nvmlDeviceGetHandleByIndex = lambda i: cards[i]
    nvml.nvmlDeviceGetHandleByUUID = by_uuid
    nvml.nvmlDeviceGetUUID = lambda card: card.uuid
    nvml.nvmlDeviceGetName = lambda card: card.name
    nvml.nvmlDeviceGetCudaComputeCapability = lambda card: card.capability
    nvml.nvmlDeviceGetMemoryInfo = memory
    nvml.nvmlDeviceGetComputeRunningProcesses = processes
    nvml.nvmlDeviceGetGraphicsRunningProcesses = graphics
    if has_v2:
        nvml.nvmlMemory_v2 = 33554472
    return nvml


@pytest.fixture
def use_nvml(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call with one mapping of :class:`FakeCard` fields for each card, and the keywords of ``fake_pynvml``."""

    def install(*cards: dict[str, Any], **keywords: Any) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
        monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(*(FakeCard(**card) for card in cards), **keywords))

    return install
