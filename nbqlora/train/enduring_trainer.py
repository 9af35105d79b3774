"""What outlasting a shortage of memory needs of Trainer: where its loop comes through, and what it is told."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from transformers import Trainer, TrainerCallback

from nbqlora.engine.loaded import LoadedModel
from nbqlora.train.batch import MicroBatch, in_few_shapes
from nbqlora.train.enduring import Enduring
from nbqlora.train.ladder import Ladder, means_of
from nbqlora.train.oom import EVAL, PROBE, Shortage
from nbqlora.train.split import Batch, Collate
from nbqlora.train.state import Generators
from nbqlora.train.stepping import Stepping
from nbqlora.train.whole_step import keep_whole, make_states


class TellShort(Protocol):
    """Takes a shortage that was met, as an event."""

    def __call__(self, *, step: int, phase: str, asked_bytes: int | None, action: str) -> None:
        """As :class:`nbqlora.core.events.OomEvent`."""


class EnduringTrainer(Trainer):
    """Stands first among the bases.

    Subclasses say what runs: :meth:`run_part` for a micro-batch or a part of one, :meth:`eval_part` in an evaluation.
    """

    data_collator: Any
    optimizer: Any
    enduring: Enduring
    stepping: Stepping

    def endure(self, loaded: LoadedModel, ram_bytes: int, tell: TellShort) -> None:
        """Before training: everything from here on is tried again.

        Args:
            ram_bytes: host memory that inputs of layers may take; 0 for none.
            tell: told what was short, and what is done about it.
        """
        self._loaded, self._tell = loaded, tell
        self._micro_batches: list[MicroBatch] = []
        self._eval_sums: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._rehearses = False
        ladder = Ladder(loaded, means_of(loaded, ram_bytes), self._tell_short)
        self.enduring = Enduring(loaded, ladder, self.run_part, lambda: self.model.zero_grad())
        self.stepping = Stepping(loaded.device, ladder)
        self.add_callback(_ReadyOptimizer(self))

    def run_part(self, inputs: Batch, count: Any) -> torch.Tensor:
        """Forward and backward; its share of the step's loss, detached. TRL's own where it is not overridden."""
        loss: torch.Tensor = super().training_step(self.model_wrapped, inputs, count)
        return loss

    def eval_part(self, inputs: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the losses of the learned tokens; nothing is kept for a backward."""
        raise NotImplementedError

    def training_step(self, model: Any, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, remembered until the step is known to be finite, run until it fits."""
        random = Generators.now(self._loaded.device)
        batch = MicroBatch(inputs=inputs, count=num_items_in_batch, random=random)
        self.enduring.train(batch, self._micro_batches, self.collate_part())
        self._micro_batches.append(batch)
        return batch.loss

    def prediction_step(
        self, model: Any, inputs: Batch, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[torch.Tensor, None, None]:
        """The batch's mean loss; its sums are kept."""
        sums = self.enduring.evaluate(inputs, self.eval_part, self.data_collator)
        self._eval_sums += sums
        total, count = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        return total / count.clamp(min=1), None, None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's.

        Raises:
            MemoryExhaustedError: an optimizer's step did not fit on another rank; the first one's is saved.
        """
        done = super().train(*args, **kwargs)
        self.stepping.check_end()
        return done

    def ready_optimizer(self) -> None:
        """Before the first step: its optimizer has its states, and its step is whole or not begun; on all ranks.

        Raises:
            MemoryExhaustedError: there is no room for the states, on one of them.
        """
        self.stepping.in_step(partial(make_states, self.optimizer.optimizer))
        self.stepping.agree_to_stop("")
        self.stepping.check_end()
        keep_whole(self.optimizer, self.stepping.in_step)

    def rehearse(self, inputs: Batch) -> int:
        """Forward and backward of a micro-batch that belongs to no step, run until it fits; its gradients are dropped.

        Returns:
            How often memory ran out.

        Raises:
            MemoryExhaustedError: it does not fit, whatever is lowered.
        """
        self.current_gradient_accumulation_steps = 1  # set by each step before it runs
        (inputs,), count = self.get_batch_samples(iter([inputs]), 1, self._loaded.device)
        batch = MicroBatch(inputs=inputs, count=count, random=Generators.now(self._loaded.device))
        self._rehearses = True
        try:
            return self.enduring.train(batch, (), self.collate_part())
        finally:
            self._rehearses = False
            self.model.zero_grad()

    def collate_part(self) -> Collate:
        """What makes a micro-batch, or a part of one, of rows: the run's own collator, in few shapes if captured."""
        step = self._loaded.micro_step()
        collate: Callable[[Any], Batch] = self.data_collator
        return in_few_shapes(collate, step.fix) if step.captures else collate

    def _tell_short(self, short: Shortage, action: str) -> None:
        step = self.state.global_step + (short.phase != EVAL)
        phase = PROBE if self._rehearses else short.phase
        self._tell(step=step, phase=phase, asked_bytes=short.asked_bytes, action=action)


class _ReadyOptimizer(TrainerCallback):
    """Calls the trainer when its optimizer is there, with the states of a checkpoint if there was one."""

    def __init__(self, trainer: EnduringTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing was trained or evaluated yet."""
        self._trainer.ready_optimizer()
