"""``SFTTrainer`` whose checkpoints go through a function, and which goes on from one bit for bit.

Trainer's own checkpoints are neither atomic nor free of pickles, so its saving is off (``save_strategy`` is
``no``) and the methods that write and read them are replaced here; a test pins that they exist and are
called. Its loop is kept: told to resume, it skips the batches of the epoch that are done and asks for
optimizer, schedule, loss scale and random numbers at the moments where each belongs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState
from trl import SFTTrainer

from nbqlora.engine.optimizer import FLAT_NAME
from nbqlora.train.optimizer_state import Part, optimizer_state, scheduler_state, set_optimizer_state
from nbqlora.train.ranks import Ranks
from nbqlora.train.state import TrainingState, kept_random_state, random_state, set_random_state

SaveState = Callable[[TrainingState], None]
# What Trainer keeps of its position; everything else in its state comes from the arguments.
POSITION = ("global_step", "epoch", "num_input_tokens_seen", "total_flos")


class ResumableTrainer(SFTTrainer):
    """TRL's trainer with checkpoints of our own.

    Args:
        save_state: takes the state when ``control.should_save`` is set, on the first of several ranks.
    """

    _ranks: Ranks

    def __init__(self, *, save_state: SaveState, callbacks: list[TrainerCallback], **arguments: Any) -> None:
        self._save_state = save_state
        self._resumed: TrainingState | None = None
        self._epoch_rng: dict[str, torch.Tensor] = {}
        self._evaluated_at = -1
        super().__init__(callbacks=[_EpochBegin(self), *callbacks], **arguments)

    def go_on(self, state: TrainingState) -> None:
        """Train from this state to the end; the model has the adapter of that step already.

        An evaluation that the state says is still due comes first.
        """
        self._resumed = state
        self.args.eval_on_start = bool(state.values["evaluation_due"])
        position = TrainerState(**state.values["position"], train_batch_size=self._train_batch_size)
        position.compute_steps(self.args, state.values["max_steps"])
        with tempfile.TemporaryDirectory(prefix="nbqlora-") as folder:
            position.save_to_json(str(Path(folder) / "trainer_state.json"))
            self.train(resume_from_checkpoint=folder)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As Trainer's, without a trace in the training: its data loader draws random numbers of its own."""
        with kept_random_state():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        self._evaluated_at = self.state.global_step
        return metrics

    def state_now(self) -> TrainingState:
        """Everything but the adapter; only between two steps is it consistent."""
        scaler = self.accelerator.scaler
        tensors, optimizer = optimizer_state(self.optimizer, self._names(), self._parts())
        now = random_state()
        # At the end of an epoch the next one begins where the generators stand.
        ended = float(self.state.epoch).is_integer()
        values = {
            "position": {name: getattr(self.state, name) for name in POSITION},
            "max_steps": self.state.max_steps,
            "evaluation_due": ended and self._skipped_evaluation(),
            "optimizer": optimizer,
            "scheduler": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        groups = {"optimizer": tensors, "rng": now, "epoch_rng": now if ended else self._epoch_rng}
        return TrainingState(step=self.state.global_step, groups=groups, values=values)

    def begin_epoch(self) -> None:
        """Before the sampler draws: at the first epoch after a resume, as that epoch began then."""
        if self._resumed is not None:
            set_random_state(self._resumed.groups["epoch_rng"])
        self._epoch_rng = random_state()

    def _skipped_evaluation(self) -> bool:
        every_epoch = self.args.eval_strategy == "epoch" and self.args.eval_delay <= self.state.epoch
        return every_epoch and self._evaluated_at != self.state.global_step

    def _names(self) -> dict[torch.Tensor, str]:
        names = {p: name for name, p in self.model.named_parameters() if p.requires_grad}
        stepped = [p for group in self.optimizer.param_groups for p in group["params"]]
        return {**names, **{p: FLAT_NAME for p in stepped if p not in names}}

    def _parts(self) -> dict[torch.Tensor, Part]:
        """How the buffer that holds all adapters is divided, where the optimizer steps one."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # within accelerate's wrapper
        adapters, names = getattr(optimizer, "adapters", None), self._names()
        if optimizer is None or adapters is None:
            return {}
        return {optimizer.flat: lambda buffer: {names[p]: adapters.view(buffer, p) for p in adapters.parameters}}

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._ranks.first:
            self._save_state(self.state_now())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the adapter is on the model."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is not None:
            values = self._resumed.values
            tensors, names, parts = self._resumed.groups["optimizer"], self._names(), self._parts()
            set_optimizer_state(self.optimizer, names, tensors, values["optimizer"], parts)
            n_groups = len(self.optimizer.param_groups)
            self.lr_scheduler.load_state_dict(scheduler_state(values["scheduler"], n_groups))

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = self.accelerator.scaler
        if self._resumed is not None and scaler is not None and self._resumed.values["scaler"] is not None:
            scaler.load_state_dict(dict(self._resumed.values["scaler"]))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Called once: where the epoch is entered, behind the batches that are skipped."""
        if self._resumed is not None:
            set_random_state(self._resumed.groups["rng"])
            self._resumed = None


class _EpochBegin(TrainerCallback):
    """Calls the trainer at the moment before an epoch's data loader is opened."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self._trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing of the epoch was drawn yet."""
        self._trainer.begin_epoch()
