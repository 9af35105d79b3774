"""The cards of this machine as a person has to know them: which, how many, with which driver, hidden by what.

All through NVML: CUDA is not started, and a card that torch cannot use is seen too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from nbqlora.core.doctor import Check
from nbqlora.core.units import GIB, format_bytes
from nbqlora.memory.nvml import Card, read_card

DRIVER_FILE = Path("/dev/nvidiactl")
# With less the CUDA context and the demo model just fit.
FEW_BYTES = 2 * GIB


@dataclass(frozen=True, kw_only=True)
class Driver:
    """NVIDIA's driver and what it knows.

    Args:
        version: as NVIDIA writes it, "550.54.15".
        cuda: the newest CUDA that it runs; None when it does not say.
        names: all cards, also those that are hidden from CUDA.
        capability: compute capability of the card that a run would take; None when there is none.
    """

    version: str
    cuda: tuple[int, int] | None
    names: tuple[str, ...]
    capability: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The card that a run would take, or why there is none, and the driver.

    Args:
        has_driver: a driver is loaded, whatever NVML says.
    """

    card: Card | None
    why: str
    driver: Driver | None
    has_driver: bool

    @property
    def capability(self) -> tuple[int, int] | None:
        """Compute capability of that card."""
        return self.driver.capability if self.driver else None


def read_machine() -> Machine:
    """Ask NVML; 10 to 50 ms, and nothing without a driver."""
    card, why = read_card()
    return Machine(card=card, why=why, driver=_driver(card), has_driver=DRIVER_FILE.exists())


def _driver(card: Card | None) -> Driver | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return Driver(
            version=pynvml.nvmlSystemGetDriverVersion(),
            cuda=_cuda(pynvml),
            names=tuple(pynvml.nvmlDeviceGetName(h) for h in handles),
            capability=_capability(pynvml, card.uuid) if card else None,
        )
    except pynvml.NVMLError:  # read_card() has said why
        return None


def _cuda(nvml: ModuleType) -> tuple[int, int] | None:
    try:
        number = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
    except nvml.NVMLError:
        return None
    return number // 1000, number % 1000 // 10


def _capability(nvml: ModuleType, uuid: str) -> tuple[int, int] | None:
    try:
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(nvml.nvmlDeviceGetHandleByUUID(uuid))
    except nvml.NVMLError:  # a slice of a card does not say
        return None
    return int(major), int(minor)


def card_check(machine: Machine, environ: Mapping[str, str], *, cpu: str, get_a_card: str = "") -> Check:
    """Which card a run would take.

    Args:
        cpu: what it would take otherwise ("2 CPU cores").
        get_a_card: how to get a card where that is a matter of settings (Colab, Kaggle); "" elsewhere.
    """
    if machine.card is not None:
        return _there(machine, machine.card, environ)
    driver = machine.driver
    if driver and driver.names:
        found = f"CUDA_VISIBLE_DEVICES = {environ.get('CUDA_VISIBLE_DEVICES')!r} hides {_many(driver.names)}"
        advice = "unset it and restart the kernel, to use a card"
        return Check(name="card", status="warning", found=found, advice=advice)
    if machine.has_driver:
        advice = "pip install nvidia-ml-py" if "not installed" in machine.why else "see what nvidia-smi says"
        found = f"a driver, but no card to be seen: {machine.why}"
        return Check(name="card", status="warning", found=found, advice=advice)
    found = f"none: a run takes the CPU ({cpu})"
    return Check(name="card", status="warning" if get_a_card else "ok", found=found, advice=get_a_card)


def _there(machine: Machine, card: Card, environ: Mapping[str, str]) -> Check:
    driver, parts = machine.driver, [card.name]
    if machine.capability:
        parts.append(f"capability {_dotted(machine.capability)}")
    parts.append(f"{format_bytes(card.free_bytes)} of {format_bytes(card.total_bytes)} free")
    if driver:
        parts.append(f"driver {driver.version}" + (f" (CUDA {_dotted(driver.cuda)})" if driver.cuda else ""))
    found = ", ".join(parts) + _others(driver, card, environ)
    if card.free_bytes >= FEW_BYTES:
        return Check(name="card", status="ok", found=found, advice="; ".join(card.notes))
    own = card.own_bytes or 0
    advice = "another program holds the rest: nvidia-smi names it"
    if own > card.used_bytes // 2:
        advice = f"this process holds {format_bytes(own)}: restart the kernel"
    return Check(name="card", status="warning", found=found, advice=advice)


def _others(driver: Driver | None, card: Card, environ: Mapping[str, str]) -> str:
    n_all = len(driver.names) if driver else card.n_cards
    if n_all > card.n_cards:
        return f"; {card.n_cards} of {n_all} cards visible: CUDA_VISIBLE_DEVICES = {environ['CUDA_VISIBLE_DEVICES']!r}"
    return f'; {n_all} cards, a run takes the first, or with gpus = "all" each of them' if n_all > 1 else ""


def _many(names: tuple[str, ...]) -> str:
    return names[0] if len(names) == 1 else f"all {len(names)} cards ({', '.join(dict.fromkeys(names))})"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
