"""The main job, one way; each arrow is a value you can print::

    CellRequest -validate-> FinetuneConfig -look-> Look -plan-> Plan -load-> LoadedModel
                -train-> events -save-> SavedAdapter -report-> Report

Magic, API and shell all come through :func:`finetune`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import (
    DoesNotFitError,
    InterruptedRunError,
    LostRankError,
    MemoryExhaustedError,
    NbqloraError,
    NonFiniteLossError,
    clear_frames,
)
from nbqlora.core.events import DataEvent, Event, Observer, PlannedEvent, SavedEvent
from nbqlora.core.plan import Plan
from nbqlora.core.ranks import Rank, rank_of, see_one_card
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import format_bytes
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.planner.cards import cards_asked
from nbqlora.run.exhausted import with_what_fits
from nbqlora.run.job import Job
from nbqlora.run.journal import Journal
from nbqlora.run.look import HandedPair, look, place_of
from nbqlora.run.ranks import begun_alike, joined, look_together
from nbqlora.run.result import Run
from nbqlora.run.resume import begin, laid_out_then
from nbqlora.run.session import free_all
from nbqlora.run.tables import table_fields
from nbqlora.run.workers.counting import workers_asked
from nbqlora.run.workers.together import finetune_together
from nbqlora.train.ranks import Ranks


def make_plan(
    request: CellRequest,
    *,
    name: str = "run",
    device: DeviceSpec | None = None,
    observe: Observer | None = None,
    n_nodes: int = 1,
) -> Plan:
    """Steps 1 to 4 only: nothing is loaded or allocated.

    Args:
        device: the machine to plan for; None looks at this one.
        observe: called with what is found in the data, before anything is planned.
        n_nodes: machines like it, each with as many cards as ``gpus`` says.
    """
    config = validate(request, table_fields=table_fields)
    journal = Journal(observe)
    with quiet_libraries(progress_bars=True):
        seen = look(config, name, journal.note, device)
    seen = replace(seen, cards=cards_asked(config, seen.device, n_nodes))
    journal.emit(DataEvent(report=seen.train.report, elapsed_seconds=journal.clock()))
    return begin(config, seen, resume=False, how=how_to_resume(request, name)).plan


def finetune(
    request: CellRequest,
    *,
    name: str = "run",
    observe: Observer | None = None,
    resume: bool = False,
    called: float | None = None,
) -> Run:
    """The whole job.

    Args:
        request: what was asked for, unchecked.
        name: names the run and its folder.
        observe: called with each event, as it happens.
        resume: go on from the furthest checkpoint in the run's folder, from the beginning where there is none.
        called: when the user asked for it, as :class:`Journal` takes it: this module's imports take seconds.

    Raises:
        ConfigError: everything wrong with the request.
        RunError: the checkpoints in the folder are of another run.
        NbqloraError: whatever else stops it, with the memory of the run given back.
    """
    rank = rank_of(os.environ)
    if not rank.alone:
        see_one_card(rank, os.environ)
        # Whoever started the ranks decided how many there are.
        request = replace(request, options={**request.options, "gpus": rank.n})
    config = validate(request, table_fields=table_fields)
    return finetune_config(config, observe, name=name, resume=resume, how=how_to_resume(request, name), called=called)


def finetune_config(
    config: FinetuneConfig,
    observe: Observer | None,
    *,
    name: str,
    resume: bool,
    how: str,
    rows: HandedPair | None = None,
    called: float | None = None,
) -> Run:
    """:func:`finetune` for options that are checked.

    Args:
        how: what the user writes to resume, for messages.
        rows: to train on and to evaluate on, where another process read them.
        called: when the user asked for it, in this process or the one that started it.
    """
    free_all()
    journal = Journal(observe, called)
    job: Job | None = None
    try:
        n = workers_asked(config, os.environ)
        if n > 1:
            return finetune_together(config, n, journal, name=name, resume=resume, how=how, finetune=finetune_config)
        with joined(os.environ) as rank, quiet_libraries(progress_bars=True):
            job = _planned(config, journal, rows, rank, name=name, resume=resume, how=how)
            return job.do()
    except BaseException as error:
        clear_frames(error)
        failure = _in_our_words(error, config, job, journal)
        if failure is None:
            if job is not None:
                job.session.free()
                if job.hint():
                    error.add_note(job.hint())
            raise
    if job is not None:
        job.session.free()
    raise failure from None


def _planned(
    config: FinetuneConfig, journal: Journal, rows: HandedPair | None, rank: Rank, *, name: str, resume: bool, how: str
) -> Job:
    """Steps 3 and 4, told."""
    journal.phase("look")
    ranks = Ranks(torch.device("cpu"))
    fetch, look_here = partial(place_of, config, journal.note), partial(look, config, name, journal.note, rows=rows)
    seen = look_together(ranks, rank, fetch, look_here)
    seen = laid_out_then(config, seen) if resume else seen
    journal.emit(DataEvent(report=seen.train.report, elapsed_seconds=journal.clock()))
    beginning = begin(config, seen, resume=resume, how=how)
    begun_alike(ranks, beginning)
    job = Job(config, seen, beginning, name=name, journal=journal, how=how, again=finetune_config, ranks=ranks)
    journal.emit(PlannedEvent(plan=beginning.plan, elapsed_seconds=journal.clock()))
    return job


def _in_our_words(
    error: BaseException, config: FinetuneConfig, job: Job | None, journal: Journal
) -> NbqloraError | None:
    """What a run ends with, and what to do now; None for an error that is shown as it is."""
    if isinstance(error, torch.OutOfMemoryError):
        return None if job is None else DoesNotFitError(_out_of_memory(job.plan, error) + job.hint())
    if isinstance(error, NbqloraError):
        return _with_advice(error, config, job, journal.events).with_traceback(None)
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError(_interrupted(journal) + (job.hint() if job else ""))
    return None


def _with_advice(error: NbqloraError, config: FinetuneConfig, job: Job | None, events: Sequence[Event]) -> NbqloraError:
    """The error of a run that began, with what to do now; any other as it is."""
    if job is None:
        return error
    if isinstance(error, MemoryExhaustedError):
        return with_what_fits(error, config, job.plan, events, job.hint(), writes=job.writes)
    if isinstance(error, NonFiniteLossError | InterruptedRunError | LostRankError):
        return type(error)(f"{error}{job.hint()}")
    return error


def _interrupted(journal: Journal) -> str:
    """An interrupt that no one took: before training, or once more while saving."""
    steps, saved = journal.steps(), [e for e in journal.events if isinstance(e, SavedEvent)]
    if not steps:
        return "interrupted before training began; nothing was saved"
    if saved and saved[-1].step == steps[-1].step:
        return f"interrupted while saving; what was saved last is {saved[-1].path}"
    return "interrupted while saving; the adapter on disk, if any, is of an earlier run"


def how_to_resume(request: CellRequest, name: str) -> str:
    """What to write to go on with a run: in a cell, a shell or Python, wherever the request came from."""
    if request.source == "this cell":
        return f"write %%finetune {name} --resume"
    return f"run nbqlora finetune {request.source} --resume" if request.line_of else "call it with resume=True"


def _out_of_memory(plan: Plan, error: Exception) -> str:
    return (
        f"{plan.device.name} ran out of memory although the plan said {format_bytes(plan.predicted_peak_bytes)} of "
        f"{format_bytes(plan.usable_bytes)}: {str(error).splitlines()[0]}\n"
        "  all memory of this run was given back; set vram_gib lower than before, or max_length, and run it again"
    )
