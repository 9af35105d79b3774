"""Writes a run's checkpoints while it trains, and knows where ``--resume`` would go on.

A checkpoint that cannot be written must not end the run that it is there to protect: what the disk says
becomes a note, and the next one is tried when its time has come.
"""

from __future__ import annotations

from pathlib import Path

from nbqlora.core.checks import integer
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.events import SavedEvent
from nbqlora.hub.atomic import remove_leftovers
from nbqlora.hub.checkpoint import (
    CHECKPOINTS_FOLDER,
    Checkpoint,
    find_checkpoints,
    prune_checkpoints,
    write_checkpoint,
)
from nbqlora.run.history import pack_events
from nbqlora.run.identity import differences
from nbqlora.run.journal import Journal
from nbqlora.run.resume import Beginning, plan_facts
from nbqlora.run.session import Session
from nbqlora.run.versions import versions
from nbqlora.train.state import TrainingState

KEEP_DEFAULT = 2


def keep_limit(config: FinetuneConfig) -> int:
    """How many checkpoints stay: ``trl.save_total_limit``. Raises :class:`ConfigError`."""
    asked = config.trl.get("save_total_limit")
    wrong = "" if asked is None else integer(at_least=1)(asked)
    if wrong:
        raise ConfigError([Problem(key="trl.save_total_limit", message=wrong)])
    return KEEP_DEFAULT if asked is None else int(asked)


class Saver:
    """Saves the states that a trainer hands out.

    The last ``trl.save_total_limit`` (2) by time of writing stay, and the furthest.

    Args:
        session: holds the model whose adapter is saved.
        writes: False for a process that leaves all files to another one.
    """

    def __init__(
        self,
        config: FinetuneConfig,
        beginning: Beginning,
        output_dir: Path,
        session: Session,
        journal: Journal,
        *,
        writes: bool = True,
    ) -> None:
        self._config, self._beginning = config, beginning
        self._session, self._journal = session, journal
        self._root = output_dir / CHECKPOINTS_FOLDER
        self._furthest, self._keep = beginning.furthest, keep_limit(config)
        self._damaged = set(beginning.damaged)
        if not writes:
            return
        for folder in (output_dir, self._root):
            remove_leftovers(folder)
        if beginning.checkpoint is not None:
            self._prune()  # what a kill right behind a write left

    @property
    def furthest(self) -> int:
        """The step after which ``--resume`` goes on; 0 when there is no checkpoint."""
        return self._furthest

    def __call__(self, state: TrainingState) -> None:
        """Write a checkpoint, then remove those that it makes needless."""
        try:
            written = self._there(state.step) or self._write(state)
        except OSError as error:
            self._journal.note(f"no checkpoint of step {state.step}: {str(error).splitlines()[0]}; the run goes on")
            return
        self._furthest = max(self._furthest, state.step)
        self._damaged.discard(written.folder)
        path, elapsed = str(written.folder), self._journal.clock()
        self._journal.emit(SavedEvent(step=state.step, path=path, n_bytes=written.n_bytes, elapsed_seconds=elapsed))
        self._prune()

    def _prune(self) -> None:
        try:
            prune_checkpoints(self._root, keep=self._keep, is_own=self._is_own)
        except OSError as error:
            self._journal.note(f"old checkpoints stay: {str(error).splitlines()[0]}")

    def _there(self, step: int) -> Checkpoint | None:
        """This step of this run, whole, from an earlier attempt: what would be written is the same."""
        found, _ = find_checkpoints(self._root)
        return next((c for c in found if c.step == step and self._is_own(c) and not c.damage()), None)

    def _write(self, state: TrainingState) -> Checkpoint:
        plan, loaded = self._beginning.plan, self._session.loaded
        assert loaded is not None
        return write_checkpoint(
            self._root,
            model=loaded.model,
            base_name=self._config.model,
            step=state.step,
            total_steps=plan.total_steps,
            identity=self._beginning.identity,
            groups=state.groups,
            state={
                "training": state.values,
                "plan": plan_facts(plan),
                "seconds": self._journal.clock(),
                "parts": self._journal.parts,
                "versions": versions(),
                "events": pack_events(self._journal.events),
            },
        )

    def _is_own(self, other: Checkpoint) -> bool:
        """Of this run, and not one that was found damaged."""
        return other.folder not in self._damaged and not differences(other.identity, self._beginning.identity)


def training_state(checkpoint: Checkpoint) -> TrainingState:
    """What a trainer goes on from; the optimizer's tensors are read one by one, when they are asked for."""
    rng = {name: dict(checkpoint.tensors(name)) for name in ("rng", "epoch_rng")}
    groups = {"optimizer": checkpoint.tensors("optimizer"), **rng}
    return TrainingState(step=checkpoint.step, groups=groups, values=checkpoint.state["training"])
