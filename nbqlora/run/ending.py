"""Steps 8 and 9: the adapter is saved, and the report is made of what happened and written beside it.

The adapter goes first, and its copies with it: a disk that has room for it and none for ``run.json`` must not cost what
was learned, so a record that cannot be written is one more reason in the report, never an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.events import SavedEvent
from nbqlora.core.plan import Replacement, SavedAdapter
from nbqlora.core.report import Report, Status
from nbqlora.engine.loaded import LoadedModel
from nbqlora.hub.atomic import save_json
from nbqlora.memory.profile import Profile
from nbqlora.run.copies import Copies
from nbqlora.run.journal import Journal
from nbqlora.run.keeping import save_somewhere
from nbqlora.run.session import Session
from nbqlora.run.sources import RUN_FILE
from nbqlora.run.versions import versions
from nbqlora.train.ranks import Ranks


class Ending:
    """Saves and reports one run.

    Args:
        name: the run's.
        work_dir: where the run writes; ``copies`` take it from there.
        session: holds the model whose adapter is saved, and the plan that it ran on.
        ranks: the first of them writes.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        name: str,
        work_dir: Path,
        *,
        session: Session,
        journal: Journal,
        profile: Profile,
        copies: Copies,
        ranks: Ranks,
    ) -> None:
        self._config, self._name, self._work_dir = config, name, work_dir
        self._session, self._journal, self._profile = session, journal, profile
        self._copies, self._ranks = copies, ranks

    def saved(self, *, alone: bool) -> tuple[SavedAdapter | None, str]:
        """The adapter, saved and copied by the first rank, and what is not where it should be.

        Args:
            alone: the others may not come here: this rank does not wait for them.
        """
        if alone:
            return self._copies.adapter(self._save()) if self._ranks.first else (None, "")
        return self._ranks.from_first(lambda: self._copies.adapter(self._save()))

    def report(
        self,
        status: Status,
        saved: SavedAdapter | None,
        reasons: Sequence[str],
        *,
        peaks: tuple[int, ...],
        replacements: tuple[Replacement, ...],
    ) -> Report:
        """The run's report, which the first rank writes down.

        Args:
            saved: what :meth:`saved` gave.
            reasons: why it ended before its last step, and what is not where it should be.
            peaks: highest memory allocated while training, of this process or of all ranks.
            replacements: what was changed on the model, and what was left.
        """
        loaded = self._loaded()
        assert loaded.plan is not None
        report = Report(
            name=self._name,
            plan=loaded.plan,
            status=status,
            reason="; ".join(reasons),
            events=tuple(self._journal.events),
            tokens_per_second=self._journal.tokens_per_second(),
            measured_peak_bytes=max(peaks),
            rank_peaks=peaks if len(peaks) > 1 else (),
            memory=self._profile.snapshot(),
            seconds=self._journal.clock(),
            adapter=saved,
            replacements=replacements,
            versions=versions(),
        )
        return self._written(report) if self._ranks.first else report

    def _loaded(self) -> LoadedModel:
        assert self._session.loaded is not None
        return self._session.loaded

    def _save(self) -> SavedAdapter | None:
        steps = self._journal.steps()
        if not steps:
            return None
        self._journal.phase("save")
        self._profile.start("save")
        saved = save_somewhere(self._loaded(), self._work_dir, self._config.model, self._journal.note)
        event = SavedEvent(
            step=steps[-1].step, path=saved.path, n_bytes=saved.n_bytes, elapsed_seconds=self._journal.clock()
        )
        self._journal.emit(event)
        return saved

    def _written(self, report: Report) -> Report:
        file = self._work_dir / RUN_FILE
        try:
            save_json({"config": self._config.as_dict(), **report.as_dict()}, file)
        except OSError as error:  # a full disk: the adapter is saved, and must not be lost with its record
            return replace(report, reason="; ".join(filter(None, [report.reason, f"no {file}: {error}"])))
        self._copies.file(file)
        return report
