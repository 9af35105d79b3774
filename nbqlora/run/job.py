"""Steps 5 to 9 on one plan: load, train, save, report, from the first step or after a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import InterruptedRunError, MemoryExhaustedError, NonFiniteLossError, clear_frames
from nbqlora.core.events import Event, PlannedEvent, StepEvent, StoppedEvent
from nbqlora.core.plan import Replacement
from nbqlora.core.report import Report, Status
from nbqlora.core.specs import BatchLayout
from nbqlora.core.units import format_minutes
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.optimize import restore
from nbqlora.engine.packing import PackingProbe
from nbqlora.hub.checkpoint import load_adapter_weights
from nbqlora.hub.load import load
from nbqlora.planner.embedding import inputs_bytes
from nbqlora.planner.probed import probes
from nbqlora.run.copies import Copies
from nbqlora.run.ending import Ending
from nbqlora.run.history import unpack_events
from nbqlora.run.holdings import hold, profile_on
from nbqlora.run.journal import Journal
from nbqlora.run.keeping import reload_adapter
from nbqlora.run.layout import probe_loaded, settle
from nbqlora.run.loading import prepare
from nbqlora.run.look import Look
from nbqlora.run.result import Run
from nbqlora.run.resume import Beginning, begin, resumed
from nbqlora.run.saver import Saver, keep_limit, training_state
from nbqlora.run.session import Session, collect, free_pages
from nbqlora.train.ranks import Ranks
from nbqlora.train.state import TrainingState
from nbqlora.train.stop import Stop

if TYPE_CHECKING:
    from nbqlora.train.events import EventCallback
    from nbqlora.train.trainer import QLoraTrainer

# Rows whose tokens the loaded model is probed with.
FEW_ROWS = 3


class Job:
    """Steps 5 to 9 on one plan."""

    def __init__(
        self,
        config: FinetuneConfig,
        seen: Look,
        beginning: Beginning,
        *,
        name: str,
        journal: Journal,
        how: str,
        again: Callable[..., Run],
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._config, self._name, self._how, self._again = config, name, how, again
        self.session, self._journal = Session(name, busy=True), journal
        self._peak_bytes, self._profile = 0, profile_on(beginning.plan.device)
        self._replacements: tuple[Replacement, ...] = ()
        self._begins_after = 0
        self._take(seen, beginning)
        if self._checkpoint is not None:
            state, self._begins_after = self._checkpoint.state, self._checkpoint.step
            journal.restore(unpack_events(state["events"]), state["seconds"], [*state["parts"], self._begins_after])
            self._peak_bytes = max(e.peak_bytes for e in journal.steps())
        stopping = partial(journal.phase, "stop", "after this step; a second interrupt drops the step")
        self._stop = Stop(config.max_minutes, stopping, journal.since_call)

    def _take(self, seen: Look, beginning: Beginning) -> None:
        self._seen, self.plan, self._checkpoint = seen, beginning.plan, beginning.checkpoint
        writes = self._ranks.first
        self._saver = Saver(self._config, beginning, seen.work_dir, self.session, self._journal, writes=writes)
        self._copies = Copies(seen, beginning, keep_limit(self._config), self._journal, writes=writes)
        self._ending = Ending(
            self._config, self._name, seen.work_dir, session=self.session, journal=self._journal,
            profile=self._profile, copies=self._copies, ranks=self._ranks,
        )  # fmt: skip

    @property
    def writes(self) -> bool:
        """This process saves, and knows what was saved."""
        return self._ranks.first

    def hint(self) -> str:
        """A line on where to go on after a failure; "" before the first checkpoint and behind the last."""
        step, total = self._saver.furthest, self.plan.total_steps
        return f"\n  {self._how} to go on after step {step} of {total}" if 0 < step < total else ""

    def do(self) -> Run:
        """Load, train, save, report."""
        with self._profile:
            self._ranks.all_well(self._load)
            try:
                with self._stop:
                    report = self._trained()
            except BaseException:
                self._copies.wait()
                raise
        reload = partial(reload_adapter, self._config, self.plan, self._seen.location, self._seen.tokenizer)
        again = partial(self._again, name=self._name, resume=True, how=self._how)
        return Run(report=report, config=self._config, session=self.session, reload=reload, again=again)

    def _load(self) -> None:
        plan = self.plan
        self._journal.phase("load", f"{plan.model.name} in {'NF4' if plan.load_in_4bit else plan.dtype}")
        # Where they gather from each other while they prepare, none may be missing that could not load.
        self._ranks.all_well(self._read)
        self._prepare()
        if plan.data.layout is not BatchLayout.PADDED:
            self._check_layout(probe_loaded(self._loaded(), self._seen.train.dataset[:FEW_ROWS]["input_ids"]))
        # What loading took for a moment would stand in the process's peak: 0.4 GiB of the demo's 1.4 after loading.
        free_pages()

    def _read(self) -> None:
        """The model, and the adapter of a checkpoint."""
        self.session.loaded = load(self._config, self.plan, self._seen.location, self._seen.tokenizer)
        if self._checkpoint is not None:
            self._checkpoint = self._copies.back(self._checkpoint)
            load_adapter_weights(self.session.loaded.model, self._checkpoint.folder)
            self._journal.note(resumed(self._checkpoint))

    def _prepare(self) -> None:
        """Fused layers, the loss, and what stands on the model, listed."""
        loaded = self._loaded()
        self._replacements = prepare(loaded, self.plan)
        hold(self._profile, loaded)

    def _check_layout(self, found: PackingProbe) -> None:
        """Pad the rows, and plan again, where the loaded model mixes documents that its miniature kept apart."""
        if found.exact:
            return
        seen = self._seen.laid_out(*settle(self._config, found))
        resume = self._checkpoint is not None
        self._take(seen, begin(self._config, seen, resume=resume, how=self._how))
        self._prepare()
        self._journal.note(f"planned again, with padding: {found.because}")
        self._journal.emit(PlannedEvent(plan=self.plan, elapsed_seconds=self._journal.clock()))

    def _trained(self) -> Report:
        """Train, then save, whatever happened; what is written is held against further interrupts."""
        failure: NonFiniteLossError | MemoryExhaustedError | KeyboardInterrupt | None = None
        try:
            if self._begins_after < self.plan.total_steps:
                self._train()
        except (NonFiniteLossError, MemoryExhaustedError, KeyboardInterrupt) as error:
            if isinstance(error, MemoryExhaustedError) and not error.adapter_is_whole:
                raise
            clear_frames(error)
            failure = error
        stopped = [e.reason for e in self._journal.events if isinstance(e, StoppedEvent)]
        twice = isinstance(failure, KeyboardInterrupt)
        status: Status = "failed" if failure else "stopped" if stopped else "done"
        with self._stop.held():
            # The loss is that of all ranks, so all of them come here; what else failed may have failed on this one.
            alone = failure is not None and not isinstance(failure, NonFiniteLossError)
            saved, not_there = self._ending.saved(alone=alone)
            why = [*(["interrupted twice"] if twice else stopped[:1]), *filter(None, [not_there])]
            peaks = (self._peak_bytes,) if alone else tuple(self._ranks.gathered(self._peak_bytes))
            report = self._ending.report(status, saved, why, peaks=peaks, replacements=self._replacements)
        if twice:
            kept = f"the adapter is in {saved.path}" if saved else "no step was done, so nothing was saved"
            where = f"after step {self._journal.steps()[-1].step}" if stopped and saved else "in the middle of a step"
            raise InterruptedRunError(f"interrupted {where}; {kept}")
        if failure:
            raise failure
        return report

    def _checkpoint_now(self, state: TrainingState) -> None:
        told = len(self._journal.events)
        with self._stop.held(), self._profile.within("save"):
            self._saver(state)
            self._copies.saved(self._journal.events[told:])

    def _loaded(self) -> LoadedModel:
        assert self.session.loaded is not None
        return self.session.loaded

    def _train(self) -> None:
        loaded, profile, evaluation = self._loaded(), self._profile, self._seen.evaluation
        trainer, events = self._trainer(loaded)
        if evaluation is not None and self._checkpoint is None:
            self._journal.note(f"first evaluating {evaluation.stats.n_rows} rows, to compare with")
        try:
            profile.start("load")
            if self._checkpoint is None:
                trainer.train()
            else:
                trainer.go_on(training_state(self._checkpoint))
            events.flush()
        except (KeyboardInterrupt, MemoryExhaustedError):
            events.flush()  # what the adapter holds must be told before it is saved
            raise
        finally:
            profile.stop()
            self._peak_bytes = profile.read()
            trainer.release()
            loaded.release()
            restore(loaded.model, own_storage=False)
            collect()
            hold(profile, loaded)

    def _trainer(self, loaded: LoadedModel) -> tuple[QLoraTrainer, EventCallback]:
        from nbqlora.run.probing import ProbeCallback
        from nbqlora.train.arguments import trainer_arguments
        from nbqlora.train.events import EventCallback, StepMeter
        from nbqlora.train.phases import PhaseCallback
        from nbqlora.train.trainer import QLoraTrainer

        meter, evaluation = StepMeter(), self._seen.evaluation
        events = EventCallback(
            emit=self._step,
            meter=meter,
            stop=self._stop,
            peak=self._profile.read,
            clock=self._journal.clock,
            save_seconds=self._config.save_minutes * 60,
            agree=lambda reason, due: trainer.stepping.agree_to_stop(reason, due),
        )
        trainer = QLoraTrainer(
            loaded=loaded,
            arguments=trainer_arguments(self._config, self.plan, evaluation is not None),
            train_dataset=self._seen.train.dataset,
            eval_dataset=None if evaluation is None else evaluation.dataset,
            meter=meter,
            find_rows=self._seen.train.find_rows,
            save_state=self._checkpoint_now,
            enter=self._profile.enter,
            ram_bytes=inputs_bytes(self._config, self.plan),
            tell_short=events.out_of_memory,
            callbacks=[events, PhaseCallback(self._profile.enter, partial(hold, self._profile, loaded))],
        )
        if probes(self.plan.device):
            trainer.add_callback(ProbeCallback(trainer, loaded, self._profile.measured, events.probed))
        return trainer, events

    def _step(self, event: Event) -> None:
        self._journal.emit(event)
        self._copies.tell()
        if isinstance(event, StepEvent) and event.step == self._begins_after + 1 < event.total_steps:
            minutes = format_minutes(event.seconds * (event.total_steps - self._begins_after))
            self._journal.note(f"the first step took {event.seconds:.1f} s: {minutes} of training")
