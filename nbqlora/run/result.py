"""``Run``: what a finished run leaves, without holding on to memory that nobody uses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import RunError
from nbqlora.core.events import Observer
from nbqlora.core.report import Answer, Comparison, Report
from nbqlora.engine.generate import generate
from nbqlora.engine.loaded import LoadedModel
from nbqlora.memory.host import read_host
from nbqlora.run.saved import SavedRun
from nbqlora.run.session import Session, free_all


class Run(SavedRun):
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
        super().__init__(report=report, config=config, session=session)
        session.busy = False
        self._reload = reload
        self._again = again

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
