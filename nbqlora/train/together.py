"""Data parallel, exactly: each rank's trainer thinks that it is alone; its rows, sums and gradients are shared here.

accelerate's own way cannot be used. It would wrap the model in DDP, whose hooks never fire where a block writes its
``.grad`` itself; it hands out whole micro-batches in turns and repeats rows at the end of an epoch, which makes another
run than one card's; and it averages losses. So accelerate is not told that there are others
(:func:`nbqlora.core.ranks.without_signs`), and what is shared is this:

- the rows of a step (:mod:`nbqlora.train.spread`), and the number of its learned tokens, by which each micro-batch's
  loss is divided: gradients and losses of all ranks then add up to those of one card;
- the gradients of the adapters, added in one all-reduce of their flat buffer behind the last backward of a step, before
  they are clipped. Only then is it known that no rank ran out of memory and has to run the step's micro-batches again;
- dropout: the first rank draws as a card alone does, and its generators stand in the checkpoint. The others' are seeded
  anew for each step from seed, rank and step, so there is nothing of them to keep.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.loaded import LoadedModel
from nbqlora.train.ranks import Ranks
from nbqlora.train.spread import EvalBatches, SpreadBatches, row_lengths, with_batches


class TogetherTrainer(Trainer):
    """Stands before the trainers that it changes; where the process is alone it changes nothing."""

    _ranks: Ranks
    _loaded: LoadedModel
    _adapters: FlatAdapters | None

    def train_together(self) -> None:
        """Before training: adds the callback that keeps the ranks alike, and apart where they should differ."""
        if self._ranks.alone:
            return
        if getattr(self.args, "train_sampling_strategy", "") == "batch_rebalance":
            message = "each rank's rows are balanced already, so that all finish together"
            hint = "leave it out where several cards train"
            raise ConfigError([Problem(key="trl.train_sampling_strategy", message=message, hint=hint)])
        # The loss is divided by the learned tokens whatever the model's forward takes: they must be counted.
        self.model_accepts_loss_kwargs = True
        if not self._ranks.first:  # one tracker sees the run
            for kind in get_reporting_integration_callbacks(self.args.report_to):
                self.remove_callback(kind)
        self.add_callback(_RankCallback(self._ranks, self._loaded, self.args.seed))

    def get_train_dataloader(self) -> Any:
        """This rank's share of each step."""
        loader: Any = super().get_train_dataloader()
        plan = self._loaded.plan
        if self._ranks.alone:
            return loader
        assert plan is not None
        data = loader.base_dataloader.dataset
        batches = SpreadBatches(
            loader.batch_sampler,
            row_lengths(data),
            self._ranks,
            rows=plan.effective_batch_size,
            batch_size=self.args.per_device_train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
        )
        return self.accelerator.prepare(with_batches(loader, batches))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As one card's, which groups the rows of a whole step where it groups any."""
        before, plan = self.args.gradient_accumulation_steps, self._loaded.plan
        if not self._ranks.alone and plan is not None:
            self.args.gradient_accumulation_steps = max(1, plan.effective_batch_size // self.args.train_batch_size)
        try:
            return super()._get_train_sampler(train_dataset)
        finally:
            self.args.gradient_accumulation_steps = before

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """This rank's share of the batches."""
        loader: Any = super().get_eval_dataloader(eval_dataset)
        if self._ranks.alone:
            return loader
        inner = loader.base_dataloader
        batches = EvalBatches(inner.batch_sampler, len(inner.dataset), self._ranks)
        return self.accelerator.prepare(with_batches(loader, batches))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """The step's micro-batches on this rank, and the learned tokens of all ranks'."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        return batches, count if self._ranks.alone else self._ranks.add_(torch.as_tensor(count).clone())

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch; behind the last one of a step the gradients are those of all ranks."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not self._ranks.alone and self.accelerator.sync_gradients:
            self._add_gradients()
        return loss

    def _add_gradients(self) -> None:
        flat = self._adapters
        if flat is not None:
            flat.begin_gradients()
            self._ranks.add_(flat.all_gradients())
            return
        self._add_each(list(self._loaded.trainable()))

    def _add_each(self, parameters: list[torch.nn.Parameter]) -> None:
        """Parameters with storage of their own: their gradients are copied into one buffer, and back."""
        has = self._ranks.total(*(float(p.grad is not None) for p in parameters))
        there = [p for p, n in zip(parameters, has, strict=True) if n]
        for parameter in there:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for dtype in {p.dtype for p in there}:
            gradients = [p.grad for p in there if p.dtype == dtype and p.grad is not None]
            buffer = self._ranks.add_(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, piece in zip(gradients, buffer.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(piece.view_as(gradient))


class _RankCallback(TrainerCallback):
    """Adapters are the first rank's when training begins; dropout is not."""

    def __init__(self, ranks: Ranks, loaded: LoadedModel, seed: int) -> None:
        self._ranks, self._loaded, self._seed = ranks, loaded, seed

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing was trained yet."""
        self._ranks.take_firsts_(p.data for p in self._loaded.trainable())

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The step's batches are there, and nothing of it was drawn."""
        if not self._ranks.first:
            of_step = np.random.SeedSequence([self._seed, self._ranks.number, state.global_step])
            torch.manual_seed(int(of_step.generate_state(1, np.uint64)[0]))
