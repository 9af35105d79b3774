"""A run with workers: the rows are tokenized here and once, everything else happens in the workers.

This process holds nothing on any card: sessions of finished runs were freed before, and no model is loaded. The workers
import their libraries (6 s), start CUDA, connect and compile their kernels while the rows are read here, and open the
tokens where they lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.events import Observer
from nbqlora.core.plain import described
from nbqlora.core.plan import Plan
from nbqlora.core.report import Report
from nbqlora.core.specs import BatchLayout
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.run.journal import Journal
from nbqlora.run.keeping import reload_adapter
from nbqlora.run.look import place_of, read_both, tokenizer_of
from nbqlora.run.result import Run
from nbqlora.run.session import Session
from nbqlora.run.workers.starting import Workers
from nbqlora.run.workers.watching import Watch
from nbqlora.run.workers.worker import get_ready

Finetune = Callable[..., Run]


def finetune_together(
    config: FinetuneConfig, n: int, journal: Journal, *, name: str, resume: bool, how: str, finetune: Finetune
) -> Run:
    """A run of ``n`` processes.

    Args:
        finetune: the ordinary run, as :func:`nbqlora.run.steps.finetune_config`; each worker calls it.

    Raises:
        NbqloraError: as the ordinary run, or why a worker ended; no worker is left then.
    """
    # The rows stay in this process: a worker's record says of them what this one's would.
    told = replace(config, data=described(config.data), eval_data=described(config.eval_data))
    with Workers(n, partial(get_ready, told, journal.called)) as workers, quiet_libraries(progress_bars=True):
        journal.phase("look", f"and starting {n} processes")
        location = place_of(config, journal.note)
        tokenizer = tokenizer_of(config, location)
        train, evaluation = read_both(config, tokenizer, (BatchLayout.JOINED, ""), journal.note)
        rows = (train.handed_on(), evaluation and evaluation.handed_on())
        settings: dict[str, Any] = {"name": name, "resume": resume, "how": how, "rows": rows, "called": journal.called}
        workers.tell(partial(_report, finetune, told, **settings))
        report = Watch(workers, journal.emit, journal.note, how).reports()[0]
    return Run(
        report=report,
        config=config,
        session=Session(name),
        reload=partial(_reload, config, report.plan, location, tokenizer),
        again=partial(finetune, name=name, resume=True, how=how),
    )


def _report(finetune: Finetune, config: FinetuneConfig, observe: Observer, **settings: Any) -> Report:
    """What a worker does."""
    return finetune(config, observe, **settings).report


def _reload(config: FinetuneConfig, plan: Plan, location: str, tokenizer: Any, folder: Path) -> LoadedModel:
    """As in a run's own process, where the libraries were quiet when they were imported."""
    with quiet_libraries(progress_bars=True):
        return reload_adapter(config, plan, location, tokenizer, folder)
