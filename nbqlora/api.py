"""The public functions: what a cell can do, without Jupyter."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nbqlora import run as _run
from nbqlora import view
from nbqlora.core.config import validate
from nbqlora.core.data_report import DataReport
from nbqlora.core.doctor import DoctorReport
from nbqlora.core.events import Observer
from nbqlora.core.fit import FitReport
from nbqlora.core.memory_table import MemoryTable
from nbqlora.core.merged import MergeReport
from nbqlora.core.plan import Plan
from nbqlora.core.report import VramReport
from nbqlora.core.request import CellRequest, lines_of
from nbqlora.memory import probe

if TYPE_CHECKING:
    from nbqlora.hub.gguf import ExportedGguf
    from nbqlora.run import Run
    from nbqlora.run.sources import MergeSource

Adapters = str | PathLike[str] | Sequence[str | PathLike[str]]

view.register_all()


def finetune(*, name: str = "run", observe: Observer | None = None, resume: bool = False, **options: Any) -> Run:
    """Fine-tune a model with QLoRA.

    Args:
        name: names the run and its folder (``runs/<name>`` unless ``output_dir`` is given).
        observe: called with each event (``nbqlora.core.events``) as it happens.
        resume: go on from the furthest checkpoint in the run's folder; from the beginning where there is none.
        **options: the options of a ``%%finetune`` cell; ``trl`` and ``peft`` are mappings.

    Returns:
        The finished run: ``.report``, ``.chat(text)``, ``.compare(prompts)``, ``.plot()``, ``.adapter_dir``.

    Raises:
        ConfigError: everything wrong with the options, at once.
        DoesNotFitError: no plan fits the memory; raised before any weights are read.
        DataError, ModelError: the data or the model cannot be read.
        NonFiniteLossError: the loss became NaN; the adapter of the last good step was saved.
        RunError: ``resume``, and the folder holds another run; with each difference.

    Example:
        >>> run = nbqlora.finetune(model="demo", data="demo", max_steps=16)
        >>> print(run.chat("Why is the sky blue?"))
    """
    return finetune_request(CellRequest(options=options), name=name, observe=observe, resume=resume)


def finetune_request(request: CellRequest, *, name: str, observe: Observer | None = None, resume: bool = False) -> Run:
    """:func:`finetune` for options that were written as text: a cell, a file."""
    called = perf_counter()
    with lines_of(request):
        return _run.finetune(request, name=name, observe=observe, resume=resume, called=called)


def plan(*, name: str = "run", nodes: int = 1, **options: Any) -> Plan:
    """What ``finetune`` would do with these options, and why; nothing is loaded or allocated.

    Args:
        nodes: machines like this one, each with as many cards as ``gpus`` says: more than it has, if you like.

    Raises:
        ConfigError, DoesNotFitError, DataError, ModelError: as :func:`finetune`.
    """
    return plan_request(CellRequest(options=options), name=name, nodes=nodes)


def plan_request(request: CellRequest, *, name: str, observe: Observer | None = None, nodes: int = 1) -> Plan:
    """:func:`plan` for options that were written as text."""
    with lines_of(request):
        return _run.make_plan(request, name=name, observe=observe, n_nodes=nodes)


def memory_table(max_length: int = 1024, *, card: str = "A100", **options: Any) -> MemoryTable:
    """How much VRAM models of 1B to 70B need, by the planner's arithmetic, beside the published rule of thumb.

    Minimum: the smallest ``vram_gib`` for which there is a plan with one row at a time; with nothing in host RAM, and
    with the layers' inputs there. Recommended: the smallest with which a step takes at most 10 % longer than the
    fastest one that any amount of memory allows, and the rows of a micro-batch then. Rows are full and learned whole.
    Takes about a second; no model, no card and no network are needed.

    Args:
        max_length: tokens of a row.
        card: whose kernels and speeds are taken: ``"T4"``, ``"A100"`` or ``"H100"``.
        **options: those of :func:`finetune` that are the same for all (``lora_r``, ``optim``, ``dtype``, ...).

    Returns:
        The table: ``.rows``, ``.as_dict()``.

    Raises:
        ConfigError: everything wrong with the options, at once.

    Example:
        >>> print(nbqlora.memory_table(2048, lora_r=32))
    """
    from nbqlora.planner import table
    from nbqlora.run.tables import table_fields

    table.check_table(card, options)
    asked = {**options, "model": "table", "data": "table", "max_length": max_length}
    return table.memory_table(validate(CellRequest(options=asked), table_fields=table_fields), card)


def data_report(**options: Any) -> DataReport:
    """What is in the training data: lengths, what is learned, cut and left out, duplicates, a preview.

    Args:
        **options: those of :func:`finetune`; ``model`` (for its tokenizer and template) and ``data`` are required.

    Raises:
        ConfigError, DataError, ModelError: as :func:`finetune`.
    """
    from nbqlora.run.data import data_report as look_at_data

    return look_at_data(CellRequest(options=options))


def vram() -> VramReport:
    """Memory now: the card (or RAM), this process, RAM and disk. Never starts CUDA."""
    return probe.vram()


def fit_request(request: CellRequest) -> FitReport:
    """Whether a model fits this machine, without weights and without starting CUDA; ``data`` may be missing."""
    from nbqlora.run.fit import fit

    return fit(request)


def doctor(model: str | None = None, output_dir: str = ".") -> DoctorReport:
    """What would keep a run from working here, and what to do about it; 3 to 15 s, nothing is changed.

    Args:
        model: a hub id, a folder or ``"demo"``: whether it could be loaded is checked too.
        output_dir: where a run would write.

    Returns:
        The checks: ``.ok``, ``.problems``, ``.warnings``, ``.as_dict()``; no token is in it.
    """
    from nbqlora.run.doctor import doctor as look_at_all

    return look_at_all(model, output_dir)


def merge(
    adapter: Adapters,
    path: str | PathLike[str],
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> MergeReport:
    """Write a base and its adapter as one model that plain transformers loads, a few rows at a time.

    Args:
        adapter: a run's folder, or an adapter's in PEFT's format; several are merged in their order.
        path: a folder that is not there yet, or holds an earlier merge.
        model: the base; None for the one that the adapter names.
        **settings: ``base``, ``dtype``, ``maximum_memory_usage``, ``max_shard_size``, ``temporary_location``,
            ``check``, as ``Run.merge`` has them.

    Raises:
        ConfigError, ModelError, RunError, OutOfDiskError: as ``Run.merge``.
    """
    from nbqlora.run.merging import MergeSettings
    from nbqlora.run.merging import merge as write
    from nbqlora.run.progress import bar

    how = MergeSettings(**settings)
    return write(_source(adapter, model, trust_remote_code), Path(path), how, bar)


def export_gguf(
    adapter: Adapters,
    path: str | PathLike[str],
    quantization: str = "Q8_0",
    *,
    model: str | None = None,
    trust_remote_code: bool = False,
    **settings: Any,
) -> ExportedGguf:
    """Write a base and its adapter as one GGUF file, which llama.cpp and what builds on it run.

    Args:
        adapter: as in :func:`merge`.
        path: the file.
        quantization: as in ``Run.export_gguf``.
        model: as in :func:`merge`.
        **settings: ``base``, ``maximum_memory_usage``, ``temporary_location``.

    Raises:
        ConfigError, ModelError, RunError, OutOfDiskError: as ``Run.export_gguf``.
    """
    from nbqlora.run.exporting import export
    from nbqlora.run.progress import bar

    return export(_source(adapter, model, trust_remote_code), Path(path), quantization, say=bar, **settings)


def _source(adapter: Adapters, model: str | None, trust_remote_code: bool) -> MergeSource:
    from nbqlora.run.sources import source_of_folders

    folders = [adapter] if isinstance(adapter, (str, PathLike)) else adapter
    return source_of_folders([Path(each).expanduser() for each in folders], model, trust_remote_code=trust_remote_code)
