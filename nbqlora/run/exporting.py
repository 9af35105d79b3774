"""Base and adapter as one GGUF file, straight from their files: no merged copy is written in between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.hub.gguf import ExportedGguf, export_gguf
from nbqlora.hub.merge import Progress
from nbqlora.hub.refused import disk_errors
from nbqlora.memory.allowance import check_share
from nbqlora.run.opened import BASES, opened
from nbqlora.run.sources import MergeSource


def export(
    source: MergeSource,
    path: Path,
    quantization: str = "Q8_0",
    *,
    base: str = "original",
    maximum_memory_usage: float = 0.9,
    temporary_location: str | None = None,
    say: Callable[[str], Progress] | None = None,
) -> ExportedGguf:
    """Write a GGUF file of base and adapter.

    Args:
        path: the file; one that is there is replaced when the new one is whole.
        quantization: see ``hub.gguf.export_gguf``.
        base: into the published weights (``original``) or into what training saw of them (``nf4``).
        maximum_memory_usage: share of the free RAM and VRAM that this may use.
        temporary_location: a folder for what lies on the disk meanwhile; None for beside ``path``.
        say: given a stage's name, gives what is called with how much is done, and of how much.

    Raises:
        ConfigError: a setting is wrong.
        ModelError: base or adapter cannot be merged, or llama.cpp cannot run the model; nothing was written.
        OutOfDiskError, DiskError: the disk is too small, or refuses; nothing is left of the attempt.
    """
    _check_base(base)
    share = check_share(maximum_memory_usage)
    shown, path = str(path), path.expanduser().absolute()
    spill = Path(temporary_location).expanduser() if temporary_location else path.parent
    show = say("export") if say else lambda done, total: None
    cannot = disk_errors(f"{path} cannot be written", "nothing of it is left: run it again when that is mended")
    with opened(source, base, share, spill, keep_folder=False) as files, cannot:
        exported = export_gguf(
            files.model,
            path,
            quantization,
            temporary_location=Path(temporary_location).expanduser() if temporary_location else None,
            say=lambda done, what: show(int(done * files.stored.n_bytes), files.stored.n_bytes),
        )
        return replace(exported, path=shown)


def _check_base(base: str) -> None:
    if base not in BASES:
        raise ConfigError([Problem(key="base", message=f"{base!r} is none of {', '.join(BASES)}")], "the export")
