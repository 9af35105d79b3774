"""Base and adapter opened for reading row by row, within the memory that saving may use.

What a merge and an export share.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nbqlora.core.errors import ModelError
from nbqlora.hub.adapter import check_adapter
from nbqlora.hub.atomic import HIDDEN, remove_leftovers
from nbqlora.hub.base_weights import Nf4Weights, OriginalWeights, of_files, of_model
from nbqlora.hub.lora_files import AdapterFiles, read_adapter
from nbqlora.hub.merge import DTYPES
from nbqlora.hub.merged import MergedModel, name_of_each
from nbqlora.hub.requantize import Requantizer, quantized_linears
from nbqlora.hub.stored import StoredTensors, open_model
from nbqlora.memory.allowance import Allowance, Workspace
from nbqlora.memory.host import read_host
from nbqlora.memory.workspaces import free_workspaces
from nbqlora.run.sources import MergeSource

BASES = ("original", "nf4")
# Rows in fp32 on the card, what they are made from, and the adapter's factors: far below the 0.5 GiB that saving may
# take beside a model that is loaded.
CARD_COPIES = 6


@dataclass(frozen=True, kw_only=True)
class Opened:
    """What is read, and where its rows are computed."""

    stored: StoredTensors
    base: OriginalWeights
    adapters: list[AdapterFiles]
    model: MergedModel
    device: torch.device
    allowance: Allowance
    workspace: Workspace


@contextmanager
def opened(source: MergeSource, base: str, share: float, spill_at: Path, *, keep_folder: bool) -> Iterator[Opened]:
    """Open the files; nothing but headers is read, unless a row is asked for.

    Args:
        base: ``original`` or ``nf4``.
        share: of the free memory that may be used.
        spill_at: folder for buffers that do not fit it.
        keep_folder: somebody else makes that folder and needs it afterwards.

    Raises:
        ModelError: base or adapter cannot be read, or do not fit each other.
    """
    for folder in source.adapters:
        check_adapter(folder)
    adapters = [read_adapter(folder) for folder in source.adapters]
    stored = open_model(source.folder)
    check_base(source, base)
    device, allowance = _where(share)
    with _workspace(spill_at, allowance, keep_folder) as workspace:
        weights = _base(source, base, stored, device, allowance, workspace)
        model = MergedModel(source.folder, weights, adapters, piece_bytes=allowance.piece_bytes)
        try:
            yield Opened(
                stored=stored,
                base=weights,
                adapters=adapters,
                model=model,
                device=device,
                allowance=allowance,
                workspace=workspace,
            )
        finally:
            free_workspaces()


def check_base(source: MergeSource, base: str) -> None:
    """Raise :class:`ModelError` when there is no such base of this model."""
    config = json.loads((source.folder / "config.json").read_text("utf-8"))
    if base == "original" and config.get("quantization_config"):
        raise ModelError(f'{source.folder} is stored in 4 bits, so there are no original weights; write base="nf4"')
    if base == "nf4" and not source.in_4bit:
        raise ModelError('this adapter was trained on a base that was not in 4 bits; write base="original"')


def _where(share: float) -> tuple[torch.device, Allowance]:
    """The card where it is there and has room for a few pieces, else the CPU."""
    ram = int(share * read_host().free_bytes)
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        allowance = Allowance(ram_bytes=ram, vram_bytes=int(share * (torch.cuda.mem_get_info(device)[0] + cached)))
        if allowance.vram_bytes >= CARD_COPIES * allowance.piece_bytes:
            return device, allowance
    return torch.device("cpu"), Allowance(ram_bytes=ram)


@contextmanager
def _workspace(folder: Path, allowance: Allowance, keep_folder: bool) -> Iterator[Workspace]:
    there = folder.exists()
    if not keep_folder:
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    workspace = Workspace(allowance.ram_bytes // 2, folder, HIDDEN)
    try:
        yield workspace
    finally:
        workspace.close()
        if not keep_folder and not there and not any(folder.iterdir()):
            folder.rmdir()


def _base(
    source: MergeSource,
    base: str,
    stored: StoredTensors,
    device: torch.device,
    allowance: Allowance,
    workspace: Workspace,
) -> OriginalWeights:
    if base == "original":
        return OriginalWeights(stored, device)
    dtype = DTYPES[source.dtype]
    if any(name.endswith(".quant_state.bitsandbytes__nf4") for name in stored):
        return Nf4Weights(stored, device, packed=of_files(stored), dtype=dtype)
    if source.model is not None:
        held = of_model(source.model)
        weights = dict(zip(_weights(held, stored), held.values(), strict=True))
        return Nf4Weights(stored, device, packed=weights.get, dtype=dtype)
    linears = quantized_linears(source.folder, trust_remote_code=source.trust_remote_code)
    again = Requantizer(
        stored,
        frozenset(_weights(linears, stored)),
        dtype=dtype,
        device=device,
        workspace=workspace,
        piece_bytes=allowance.piece_bytes,
    )
    return Nf4Weights(stored, device, packed=again, dtype=dtype, give_back=again.give_back)


def _weights(paths: Iterable[str], stored: StoredTensors) -> list[str]:
    """The files' names of these linears' weights, in order."""
    paths = tuple(paths)
    found = name_of_each([f"{path}.weight" for path in paths], tuple(stored))
    return [found[f"{path}.weight"] for path in paths]
