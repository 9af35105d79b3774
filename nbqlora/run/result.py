"""``Run``: what a finished run leaves, without holding on to memory that nobody uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import RunError
from nbqlora.core.events import Event, Observer
from nbqlora.core.merged import MergeReport
from nbqlora.core.plan import Plan
from nbqlora.core.report import Answer, Comparison, Report, Status
from nbqlora.engine.generate import generate
from nbqlora.engine.loaded import LoadedModel
from nbqlora.hub.gguf import ExportedGguf
from nbqlora.memory.host import read_host
from nbqlora.run.exporting import export
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.progress import bar
from nbqlora.run.publishing import publish_run
from nbqlora.run.session import Session, free_all
from nbqlora.run.sources import MergeSource, source_of_run


class Run:
    """One run and its result. Its repr, its events and its pickle hold no tensors.

    Args:
        report: what happened.
        config: what was asked for.
        session: the only owner of the model.
        reload: loads base and adapter again when the session was freed.
        again: runs these options again, from the furthest checkpoint.
    """

    def __init__(
        self,
        *,
        report: Report,
        config: FinetuneConfig,
        session: Session,
        reload: Callable[[Path], LoadedModel],
        again: Callable[..., Run],
    ) -> None:
        self.report = report
        self.config = config
        self._session, session.busy = session, False
        self._reload = reload
        self._again = again
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

    def chat(self, text: str, *, max_new_tokens: int = 128) -> Answer:
        """The tuned model's answer to one user turn, greedy.

        Args:
            text: what the user says.
            max_new_tokens: where the answer is cut.

        Raises:
            RunError: no adapter was saved.
        """
        answers = generate(self._loaded(), [text], max_new_tokens=max_new_tokens, free_ram_bytes=read_host().free_bytes)
        return Answer(answers[0])

    def compare(self, prompts: str | Sequence[str], *, max_new_tokens: int = 128) -> Comparison:
        """The base model's and the tuned model's answers to the same prompts, greedy.

        Args:
            prompts: user turns; one is enough.
            max_new_tokens: where each answer is cut.
        """
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        loaded, free = self._loaded(), read_host().free_bytes
        base, tuned = (
            generate(loaded, asked, max_new_tokens=max_new_tokens, use_adapter=adapter, free_ram_bytes=free)
            for adapter in (False, True)
        )
        return Comparison(rows=tuple(zip(asked, base, tuned, strict=True)))

    def resume(self, *, observe: Observer | None = None) -> Run:
        """Go on with a stopped run, with the same options, from its furthest checkpoint.

        Args:
            observe: called with each event, as it happens.

        Returns:
            The finished run; this one stays as it is.

        Raises:
            RunError: there is nothing left to do.
        """
        if self.status == "done":
            raise RunError(f"{self.name} is done: all {self.plan.total_steps} steps were taken")
        folder = self._folder / self.plan.output_dir
        here = folder.resolve() == Path(self.plan.output_dir).resolve()
        return self._again(replace(self.config, output_dir=self.plan.output_dir if here else str(folder)), observe)

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

    def plot(self) -> Any:
        """Loss and memory over the steps, as a matplotlib figure."""
        from nbqlora.view.figures import run_figure

        return run_figure(self.report)

    def free(self) -> None:
        """Give the model's memory back; ``chat`` and ``compare`` load it again when asked."""
        self._session.free()

    def _loaded(self) -> LoadedModel:
        if self._session.loaded is None:
            folder = self.adapter_dir
            free_all()
            self._session.loaded = self._reload(folder)
        return self._session.loaded

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_session": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._session = Session(self.report.name)

    def __repr__(self) -> str:
        return repr(self.report).replace("Report(", "Run(", 1)

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str | None:
        return self.report._repr_html_()
