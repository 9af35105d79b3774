"""What a run left on the disk, and what can be made of it: one model, a GGUF file, a page on the hub.

All of it is made from files, base and adapter: a run whose memory was given back is as good as one whose model is still
loaded. Where it is, its 4-bit weights are taken as they are, instead of being made again.
"""

from __future__ import annotations

from pathlib import Path

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import RunError
from nbqlora.core.events import Event
from nbqlora.core.merged import MergeReport
from nbqlora.core.plan import Plan
from nbqlora.core.report import Report, Status
from nbqlora.hub.gguf import ExportedGguf
from nbqlora.run.exporting import export
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.progress import bar
from nbqlora.run.publishing import publish_run
from nbqlora.run.session import Session
from nbqlora.run.sources import MergeSource, source_of_run


class SavedRun:
    """A run's record and its adapter; :class:`nbqlora.run.result.Run` adds the model.

    Args:
        report: what happened.
        config: what was asked for.
        session: holds the model, if it is loaded.
    """

    def __init__(self, *, report: Report, config: FinetuneConfig, session: Session) -> None:
        self.report = report
        self.config = config
        self._session = session
        self._folder = Path.cwd()

    @property
    def name(self) -> str:
        """The name given on the cell's first line."""
        return self.report.name

    @property
    def plan(self) -> Plan:
        """The plan that it ran on."""
        return self.report.plan

    @property
    def status(self) -> Status:
        """``done``, ``stopped`` or ``failed``."""
        return self.report.status

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that happened, in order."""
        return self.report.events

    @property
    def adapter_dir(self) -> Path:
        """The adapter's folder, in PEFT's format. Raises :class:`RunError` when none was saved."""
        if self.report.adapter is None:
            raise RunError(f"{self.name} saved no adapter: it {self.status} before its first step")
        return self._folder / self.report.adapter.path

    def merge(
        self,
        path: str | Path,
        *,
        base: str = "original",
        dtype: str = "auto",
        maximum_memory_usage: float = 0.9,
        max_shard_size: str | int = "5GB",
        temporary_location: str | None = None,
        check: bool = True,
    ) -> MergeReport:
        """Write base and adapter as one model that plain transformers loads; resumable, within little memory.

        Args:
            path: a folder that is not there yet, or holds an earlier merge.
            base: ``"original"``: into the published weights; ``"nf4"``: into what training saw of them.
            dtype: ``"auto"`` (as the base stores each tensor), ``"bf16"``, ``"fp16"`` or ``"fp32"``.
            maximum_memory_usage: share of the free RAM and VRAM that this may use, above 0 and at most 0.95.
            max_shard_size: of one file, ``"5GB"`` or bytes.
            temporary_location: a folder for what does not fit that memory; None for beside ``path``.
            check: compare the result with base and adapter on a few prompts.

        Raises:
            ConfigError: settings that are wrong, all at once.
            ModelError: the adapter cannot be merged; nothing was written.
            RunError: no adapter was saved, or ``path`` holds something else.
            OutOfDiskError: the disk is too small; finished shards stay for the next call.
        """
        settings = MergeSettings(
            base=base,
            dtype=dtype,
            maximum_memory_usage=maximum_memory_usage,
            max_shard_size=max_shard_size,
            temporary_location=temporary_location,
            check=check,
        )
        return merge(self._source(), Path(path), settings, bar)

    def export_gguf(
        self,
        path: str | Path,
        quantization: str = "Q8_0",
        *,
        base: str = "original",
        maximum_memory_usage: float = 0.9,
        temporary_location: str | None = None,
    ) -> ExportedGguf:
        """Write base and adapter as one GGUF file, which llama.cpp and what builds on it run.

        Args:
            path: the file.
            quantization: ``"F32"``, ``"F16"``, ``"BF16"``, ``"Q8_0"``, ``"Q5_1"``, ``"Q5_0"``, ``"Q4_1"``, ``"Q4_0"``,
                or, with ``nbqlora[gguf]``, a K-quant such as ``"Q4_K_M"``.
            base: as in :meth:`merge`.
            maximum_memory_usage: as in :meth:`merge`.
            temporary_location: a folder for the 16-bit file that a K-quant is made from; None for beside ``path``.

        Raises:
            ConfigError, ModelError, RunError, OutOfDiskError: as :meth:`merge`.
        """
        return export(
            self._source(),
            Path(path),
            quantization,
            base=base,
            maximum_memory_usage=maximum_memory_usage,
            temporary_location=temporary_location,
            say=bar,
        )

    def push_to_hub(
        self, repo_id: str, *, folder: str | Path | None = None, kind: str = "adapter", private: bool = True,
        token: str | None = None, revision: str | None = None, commit_message: str | None = None,
        base_model: str | None = None,
    ) -> str:  # fmt: skip
        """Put the adapter, or a folder that was merged or exported, on the hub, with a card of this run.

        Args:
            repo_id: ``owner/name``.
            folder: what :meth:`merge` wrote, or the GGUF file; None for the adapter.
            kind: ``"adapter"``, ``"merged"`` or ``"gguf"``.
            token: None for the one that huggingface_hub knows; never stored or shown.
            base_model: what the card names as the base; needed where that was a local folder.

        Returns:
            Its address.

        Raises:
            ConfigError: ``kind`` is none of the three.
            PublishError: the hub does not take it; with what to do.
        """
        return publish_run(
            self.report, Path(folder) if folder else self.adapter_dir, repo_id, kind=kind, private=private,
            token=token, revision=revision, commit_message=commit_message, base_model=base_model, say=print,
        )  # fmt: skip

    def _source(self) -> MergeSource:
        loaded = self._session.loaded
        return source_of_run(self.config, self.plan, self.adapter_dir, loaded.model if loaded else None)
