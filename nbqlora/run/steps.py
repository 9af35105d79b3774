"""The main job, one way; each arrow is a value you can print::

    CellRequest -validate-> FinetuneConfig -look-> Look -plan-> Plan -load-> LoadedModel
                -train-> events -save-> SavedAdapter -report-> Report

Magic, API and shell all come through :func:`finetune`.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from importlib import metadata

import torch

from nbqlora import planner
from nbqlora.core.config import FinetuneConfig, validate
from nbqlora.core.errors import DoesNotFitError, InterruptedRunError, NbqloraError, NonFiniteLossError
from nbqlora.core.events import (
    Event,
    Observer,
    PlannedEvent,
    SavedEvent,
    StepEvent,
    StoppedEvent,
)
from nbqlora.core.plan import Plan, Replacement, SavedAdapter
from nbqlora.core.report import Report, Status
from nbqlora.core.request import CellRequest
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import format_bytes, format_minutes
from nbqlora.core.version import __version__
from nbqlora.engine.checkpoint import apply_policies, clear_policies
from nbqlora.engine.head import choose_loss
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.hub.load import load, load_adapter
from nbqlora.hub.save import save_adapter, save_json
from nbqlora.memory.peak import PeakMeter
from nbqlora.run.journal import Journal
from nbqlora.run.look import Look, look
from nbqlora.run.result import Run
from nbqlora.run.session import Session, clear_frames, collect, free_all

LIBRARIES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets")


def make_plan(request: CellRequest, *, name: str = "run", device: DeviceSpec | None = None) -> Plan:
    """Steps 1 to 4 only: nothing is loaded or allocated.

    Args:
        device: the machine to plan for; None looks at this one.
    """
    config = validate(request, table_fields=table_fields)
    with quiet_libraries(progress_bars=True):
        return _plan(config, look(config, name, lambda line: None, device))


def finetune(request: CellRequest, *, name: str = "run", observe: Observer | None = None) -> Run:
    """The whole job.

    Args:
        request: what was asked for, unchecked.
        name: names the run and its folder.
        observe: called with each event, as it happens.

    Raises:
        ConfigError: everything wrong with the request.
        NbqloraError: whatever else stops it, with the memory of the run given back.
    """
    free_all()
    journal = Journal(observe)
    config = validate(request, table_fields=table_fields)
    journal.phase("look")
    with quiet_libraries(progress_bars=True):
        seen = look(config, name, journal.note)
    plan = _plan(config, seen)
    journal.emit(PlannedEvent(plan=plan, elapsed_seconds=journal.clock()))
    session = Session()
    failure: NbqloraError
    try:
        with quiet_libraries(progress_bars=True):
            return _Job(config, seen, plan, name, session, journal).do()
    except torch.OutOfMemoryError as error:
        clear_frames(error)
        failure = DoesNotFitError(_out_of_memory(plan, error))
    except NbqloraError as error:
        clear_frames(error)
        failure = error.with_traceback(None)
    except KeyboardInterrupt as error:
        clear_frames(error)
        failure = InterruptedRunError("interrupted before training began; nothing was saved")
    except BaseException as error:
        clear_frames(error)
        session.free()
        raise
    session.free()
    raise failure from None


def table_fields(table: str) -> frozenset[str]:
    """Names of SFTConfig's (``trl``) or LoraConfig's (``peft``) fields."""
    if table == "trl":
        from trl import SFTConfig

        return frozenset(f.name for f in dataclasses.fields(SFTConfig))
    from peft import LoraConfig

    return frozenset(f.name for f in dataclasses.fields(LoraConfig))


def _plan(config: FinetuneConfig, seen: Look) -> Plan:
    return planner.make_plan(
        config, seen.spec, seen.device, seen.train.stats, output_dir=str(seen.output_dir), notes=seen.notes
    )


class _Job:
    """Steps 5 to 9 on one plan."""

    def __init__(
        self, config: FinetuneConfig, seen: Look, plan: Plan, name: str, session: Session, journal: Journal
    ) -> None:
        self._config, self._seen, self._plan, self._name = config, seen, plan, name
        self._session, self._journal = session, journal
        self._peak_bytes = 0
        self._replacements: tuple[Replacement, ...] = ()

    def do(self) -> Run:
        self._journal.phase(
            "load", f"{self._plan.model.name} in {'NF4' if self._plan.load_in_4bit else self._plan.dtype}"
        )
        self._session.loaded = load(self._config, self._plan, self._seen.location, self._seen.tokenizer)
        try:
            self._train()
        except NonFiniteLossError:
            self._finish("failed", self._save())
            raise
        except KeyboardInterrupt:
            saved = self._save()
            self._finish("failed", saved, "interrupted twice")
            kept = f"the adapter is in {saved.path}" if saved else "no step was done, so nothing was saved"
            raise InterruptedRunError(f"interrupted in the middle of a step; {kept}") from None
        stopped = [e for e in self._journal.events if isinstance(e, StoppedEvent)]
        report = self._finish("stopped" if stopped else "done", self._save(), stopped[0].reason if stopped else "")
        reload = partial(load_adapter, self._config, self._plan, self._seen.location, self._seen.tokenizer)
        return Run(report=report, config=self._config, session=self._session, reload=reload)

    def _loaded(self) -> LoadedModel:
        assert self._session.loaded is not None
        return self._session.loaded

    def _train(self) -> None:
        from nbqlora.train.events import EventCallback, StepMeter
        from nbqlora.train.stop import Stop
        from nbqlora.train.trainer import QLoraTrainer, trainer_arguments

        loaded, plan = self._loaded(), self._plan
        policies = apply_policies(loaded.model, plan.layer_policies)
        loss, chosen = choose_loss(
            loaded.model, plan.model.head, plan.loss_chunk_tokens, loaded.device, autocast(loaded), loaded.dtype
        )
        self._replacements = (*loaded.replacements, chosen, *policies)
        stopping = partial(self._journal.note, "stopping after this step; a second interrupt drops the step")
        meter, stop = StepMeter(), Stop(self._config.max_minutes, stopping)
        peak = PeakMeter(plan.device.kind)
        events = EventCallback(emit=self._step, meter=meter, stop=stop, peak=peak.read, clock=self._journal.clock)
        evaluation = self._seen.evaluation
        trainer = QLoraTrainer(
            loaded=loaded,
            arguments=trainer_arguments(self._config, plan, evaluation is not None),
            train_dataset=self._seen.train.dataset,
            eval_dataset=None if evaluation is None else evaluation.dataset,
            loss=loss,
            meter=meter,
            find_rows=self._seen.train.find_rows,
            callbacks=[events],
        )
        if evaluation is not None:
            self._journal.note(f"first evaluating {evaluation.stats.n_rows} rows, to compare with")
        try:
            peak.start()
            with stop:
                trainer.train()
        finally:
            peak.stop()
            self._peak_bytes = peak.read()
            trainer.release()
            clear_policies(loaded.model)
            collect()

    def _step(self, event: Event) -> None:
        self._journal.emit(event)
        if isinstance(event, StepEvent) and len(self._journal.steps()) == 1 and event.total_steps > 1:
            minutes = format_minutes(event.seconds * event.total_steps)
            self._journal.note(f"the first step took {event.seconds:.1f} s: {minutes} of training")

    def _save(self) -> SavedAdapter | None:
        steps = self._journal.steps()
        if not steps:
            return None
        self._journal.phase("save")
        loaded = self._loaded()
        saved = save_adapter(loaded.model, loaded.tokenizer, self._seen.output_dir, self._config.model)
        event = SavedEvent(
            step=steps[-1].step, path=saved.path, n_bytes=saved.n_bytes, elapsed_seconds=self._journal.clock()
        )
        self._journal.emit(event)
        return saved

    def _finish(self, status: Status, saved: SavedAdapter | None, reason: str = "") -> Report:
        report = Report(
            name=self._name,
            plan=self._plan,
            status=status,
            reason=reason,
            events=tuple(self._journal.events),
            tokens_per_second=self._journal.tokens_per_second(),
            measured_peak_bytes=self._peak_bytes,
            seconds=self._journal.clock(),
            adapter=saved,
            replacements=self._replacements,
            versions={"nbqlora": __version__, **{name: metadata.version(name) for name in LIBRARIES}},
        )
        save_json({"config": self._config.as_dict(), **report.as_dict()}, self._seen.output_dir / "run.json")
        return report


def _out_of_memory(plan: Plan, error: Exception) -> str:
    return (
        f"{plan.device.name} ran out of memory although the plan said {format_bytes(plan.predicted_peak_bytes)} of "
        f"{format_bytes(plan.usable_bytes)}: {str(error).splitlines()[0]}\n"
        "  all memory of this run was given back; set vram_gib lower than before, or max_length, and run it again"
    )
