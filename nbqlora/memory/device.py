"""The machine as a plan sees it, measured; asked when a run is about to start, so CUDA may be started here.

Three figures cannot be looked up. The CUDA context differs by card, driver and libraries (0.1 to 0.6 GiB): it
is measured after a first matmul, when cuBLAS has loaded its kernels too. The speed of a card is not that of
its data sheet: that matmul is timed at the dtype that will train. And a card that is listed may not run at
all: Kaggle's torch has no kernels for Kaggle's P100, which shows at the first kernel only; so the
architectures that torch was built for are compared first.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Any

from nbqlora.core.errors import DeviceError
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import format_bytes
from nbqlora.memory.host import cpu_cores_text, cpu_model, disk_free_bytes, read_host
from nbqlora.memory.matmul import measure_matmul_flops
from nbqlora.memory.nvml import Card, read_card
from nbqlora.memory.probe import card_uuid, cards_notes, hidden_card_notes


def device_spec(output_dir: str | os.PathLike[str] = ".") -> DeviceSpec:
    """The card that torch would use, or else the CPU; takes 0.1 to 0.4 s, and the start of CUDA once.

    On a card ``free_bytes`` is read with the context in place: the context has been subtracted already.

    Raises:
        DeviceError: CUDA does not start, or this torch has no kernels for the card.
    """
    import torch

    if not torch.cuda.is_available():
        return _cpu_spec(output_dir)
    before = None if torch.cuda.is_initialized() else read_card()[0]
    index = _start_cuda(torch, before)
    return _cuda_spec(torch.cuda, index, before, output_dir)


def _cpu_spec(output_dir: str | os.PathLike[str]) -> DeviceSpec:
    flops = measure_matmul_flops("cpu", "fp32")
    host, model = read_host(), cpu_model()
    return DeviceSpec(
        kind="cpu",
        name=cpu_cores_text() + (f", {model}" if model else ""),
        total_bytes=host.total_bytes,
        free_bytes=host.free_bytes,
        context_bytes=host.process_bytes,
        host_free_bytes=host.free_bytes,
        disk_free_bytes=disk_free_bytes(output_dir),
        matmul_flops=flops,
        notes=hidden_card_notes() + host.notes,
    )


def _start_cuda(torch: Any, before: Card | None) -> int:
    """Start CUDA, check that its kernels run on the card, and return the card's index."""
    cuda = torch.cuda
    try:
        cuda.init()
        index = int(cuda.current_device())
        name, capability = cuda.get_device_name(index), cuda.get_device_capability(index)
        check_kernels(name, capability, cuda.get_arch_list(), torch.__version__)
        cuda.mem_get_info(index)
    except DeviceError:
        raise
    except RuntimeError as error:
        where = f" on {before.name}, {format_bytes(before.free_bytes)} of which are free" if before else ""
        first_line = str(error).partition("\n")[0]
        raise DeviceError(f"CUDA does not start{where}: {first_line}; restart the kernel, or free the card") from error
    return index


def _cuda_spec(cuda: Any, index: int, before: Card | None, output_dir: str | os.PathLike[str]) -> DeviceSpec:
    capability = cuda.get_device_capability(index)
    bf16 = has_bf16(capability)
    flops, notes = _matmul_rate("bf16" if bf16 else "fp16")
    context, context_notes = _context(cuda, index, before)
    free, total = cuda.mem_get_info(index)
    host = read_host()
    return DeviceSpec(
        kind="cuda",
        name=cuda.get_device_name(index),
        total_bytes=total,
        free_bytes=free + cuda.memory_reserved(index) - cuda.memory_allocated(index),
        context_bytes=context,
        host_free_bytes=host.free_bytes,
        disk_free_bytes=disk_free_bytes(output_dir),
        capability=capability,
        has_bf16=bf16,
        has_triton=capability >= (7, 0) and importlib.util.find_spec("triton") is not None,
        n_devices=cuda.device_count(),
        matmul_flops=flops,
        notes=cards_notes(cuda.device_count(), f"this run uses card {index}") + notes + context_notes + host.notes,
    )


def has_bf16(capability: tuple[int, int]) -> bool:
    """Whether the card has bf16 arithmetic; torch's own answer is True on a T4, where it is emulated."""
    return capability >= (8, 0)


def _matmul_rate(dtype_name: str) -> tuple[float | None, tuple[str, ...]]:
    try:
        return measure_matmul_flops("cuda", dtype_name), ()
    except RuntimeError as error:  # a card that is full, or deterministic mode without a cuBLAS workspace
        return None, (f"speed not measured: {str(error).partition(chr(10))[0]}",)


def _context(cuda: Any, index: int, before: Card | None) -> tuple[int, tuple[str, ...]]:
    after, why = read_card(card_uuid(cuda, index))
    same = before is not None and after is not None and before.uuid == after.uuid
    measured = context_bytes(
        reserved_bytes=cuda.memory_reserved(index),
        own_bytes=after.own_bytes if after else None,
        free_before_bytes=before.free_bytes if same and before else None,
        free_after_bytes=after.free_bytes if after else 0,
    )
    if measured is not None:
        return measured, ()
    return 0, (f"size of the CUDA context not known: {why or 'CUDA ran before it could be measured'}",)


def context_bytes(
    *, reserved_bytes: int, own_bytes: int | None, free_before_bytes: int | None, free_after_bytes: int
) -> int | None:
    """Bytes of the CUDA context, or None when it cannot be known.

    Args:
        reserved_bytes: what torch has taken of the card.
        own_bytes: this process by NVML; None when it is not listed.
        free_before_bytes: free on the card before CUDA was started; None when it had been already.
        free_after_bytes: free on the card now.
    """
    if own_bytes is not None and own_bytes >= reserved_bytes:
        return own_bytes - reserved_bytes
    if free_before_bytes is None:
        return None
    return max(0, free_before_bytes - free_after_bytes - reserved_bytes)


def check_kernels(name: str, capability: tuple[int, int], arch_list: Sequence[str], torch_version: str) -> None:
    """Raise :class:`DeviceError` when torch, built for ``arch_list``, cannot run on a card of ``capability``."""
    if kernels_cover(arch_list, capability):
        return
    major, minor = capability
    advice = (
        "on Kaggle choose Settings > Accelerator > GPU T4 x2"
        if capability < (7, 0)
        else "install a torch that was built for it"
    )
    raise DeviceError(
        f"{name} has compute capability {major}.{minor}, for which this torch ({torch_version}: "
        f"{', '.join(arch_list)}) has no kernels; {advice}"
    )


def kernels_cover(arch_list: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code built for ``arch_list`` runs on a card of ``capability``.

    ``sm_80`` is machine code: it runs on 8.0 and on later minors of that major. ``compute_80`` is PTX: the
    driver compiles it for any later card. With a suffix ``a`` both run on exactly that card, with ``f`` on
    later minors of the family. A list without an entry of these forms (another vendor's) decides nothing.
    """
    entries = [m.groups() for arch in arch_list if (m := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch))]
    return not entries or any(
        _covers(form, (int(major), int(minor)), suffix, capability) for form, major, minor, suffix in entries
    )


def _covers(form: str, built_for: tuple[int, int], suffix: str, capability: tuple[int, int]) -> bool:
    if suffix == "a":
        return built_for == capability
    if form == "compute" and not suffix:
        return built_for <= capability
    return built_for[0] == capability[0] and built_for[1] <= capability[1]
