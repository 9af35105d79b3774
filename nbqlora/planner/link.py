"""How fast cards talk with each other: measured where they are connected already, assumed elsewhere, and said."""

from __future__ import annotations

from nbqlora.core.specs import DeviceSpec

# Bytes a second that one card sends, where nothing was measured. PCIe 3.0 x16 gives about 10 of its 15.75 GB/s between
# cards that cannot reach each other's memory, as Kaggle's two T4s; NVLink is that of A100 to H200, a third in reserve.
ETHERNET, CPU, PCIE_3, PCIE_4, NVLINK = 1.25e9, 1e9, 10e9, 20e9, 300e9
WITH_NVLINK = ("A100", "A800", "H100", "H200", "H800", "H20", "B200", "B300")
# Of those the boards that are put into a slot: a bridge between two of them is not to be told from the name.
IN_A_SLOT = ("PCI", "NVL")


def link_rate(device: DeviceSpec, n_nodes: int = 1) -> tuple[float, str]:
    """Bytes a second of the slowest link between such cards, and which it is, in words."""
    if device.link_bytes_per_second:
        return device.link_bytes_per_second, f"measured {_rate(device.link_bytes_per_second)}"
    if n_nodes > 1:
        return ETHERNET, f"how fast the network between the machines is, is not known; {_rate(ETHERNET)} are assumed"
    if device.kind == "cpu":
        return CPU, f"not measured; {_rate(CPU)} are assumed"
    if any(name in device.name for name in WITH_NVLINK) and not any(name in device.name.upper() for name in IN_A_SLOT):
        return NVLINK, f"not measured; {_rate(NVLINK)} are assumed, as NVLink has"
    rate = PCIE_4 if (device.capability or (8, 0)) >= (8, 0) else PCIE_3
    return rate, f"not measured; {_rate(rate)} are assumed, as PCIe has"


def _rate(bytes_per_second: float) -> str:
    return f"{bytes_per_second / 1e9:.3g} GB/s"
