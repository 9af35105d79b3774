"""``SFTTrainer`` with our loss, fp32 adapters, exact token counts and a stop at the first NaN.

What TRL does and we take back, each on the instance: it casts quantized LoRA to bf16 in its constructor
(GradScaler then dies on fp16 cards, and resume is not exact), and it replaces the base's ``forward``.
GradScaler starts at 2**16 by default, which throws away the first steps of a run; ours starts at 2**10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.fused import engine_of
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.micro_step import MicroStep
from nbqlora.train.batch import in_few_shapes
from nbqlora.train.enduring_trainer import TellShort
from nbqlora.train.events import StepMeter
from nbqlora.train.finite import FindRows, FiniteCallback, FiniteTrainer
from nbqlora.train.interruptible import InterruptibleTrainer
from nbqlora.train.ranks import Ranks
from nbqlora.train.resumable import ResumableTrainer, SaveState
from nbqlora.train.sent import clip_
from nbqlora.train.together import TogetherTrainer
from nbqlora.train.traces import forget_in_bitsandbytes, instance_forwards, restore_forwards

INITIAL_LOSS_SCALE = 2.0**10


class QLoraTrainer(TogetherTrainer, FiniteTrainer, InterruptibleTrainer, ResumableTrainer):
    """TRL's trainer on a loaded model.

    Args:
        loaded: model, tokenizer, loss, device and dtype.
        meter: filled for the event callback.
        find_rows: names the rows of a failing batch.
        save_state: takes the state at each checkpoint.
        enter: told the phase that begins: forward, backward, step (both, captured) or eval.
        ram_bytes: host memory that inputs of layers may take where the card runs out of memory.
        tell_short: told of such a shortage, and what is done about it.
    """

    def __init__(
        self,
        *,
        loaded: LoadedModel,
        arguments: SFTConfig,
        train_dataset: Any,
        eval_dataset: Any | None,
        meter: StepMeter,
        find_rows: FindRows,
        save_state: SaveState,
        enter: Callable[[str], None],
        ram_bytes: int,
        tell_short: TellShort,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._loaded, self._meter, self._find_rows, self._enter = loaded, meter, find_rows, enter
        self._ranks = Ranks(loaded.device)
        self._one = torch.ones((), device=loaded.device)
        self._norm: torch.Tensor | None = None
        self._n_parameters: int | None = None
        self._adapters = self._all_adapters()
        self._own_forwards = instance_forwards(loaded.model)
        exact = {name: p.data for name, p in loaded.model.named_parameters() if p.requires_grad}
        arguments._n_gpu = 1  # with two cards Trainer would wrap the model in DataParallel
        super().__init__(
            model=loaded.model,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=loaded.tokenizer,
            save_state=save_state,
            callbacks=[FiniteCallback(self), *callbacks],
        )
        self.endure(loaded, ram_bytes, tell_short)
        self.train_together()
        self._take_back(exact)

    def _take_back(self, exact: Mapping[str, torch.Tensor]) -> None:
        """Undo or replace what the constructors of TRL and Trainer did to the model, and hung on this instance.

        Args:
            exact: of each parameter that trains its values from before TRL cast them.
        """
        loaded = self._loaded
        for name, p in loaded.model.named_parameters():
            if name in exact:
                p.data = exact[name]
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self._adapters is not None:
            # Trainer clears gradients through the model, which looks at every module for them: 8 ms of a 1B model.
            loaded.model.zero_grad = self._adapters.clear_gradients
        if self.args.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler(loaded.device.type, init_scale=INITIAL_LOSS_SCALE)

    def _all_adapters(self) -> FlatAdapters | None:
        """The buffer behind the adapters, when nothing else trains."""
        engine = engine_of(self._loaded.model)
        adapters = None if engine is None else engine.scratch.adapters
        return adapters if adapters is not None and all(p in adapters for p in self._loaded.trainable()) else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss a supervised token of the whole step: the sum here over the step's number of tokens."""
        self._enter("forward")
        total, count = self.sums(inputs)
        self._enter("backward")
        loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def run_part(self, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """A micro-batch, or a part of one, captured where it can be."""
        if self._step.captures and count is not None:
            return self._captured_step(inputs, count)
        return super().run_part(inputs, count)

    def eval_part(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the losses of the learned tokens."""
        self._enter("eval")
        with torch.no_grad():
            return self.sums(self._prepare_inputs(inputs))

    def sums(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the losses of a batch's learned tokens."""
        assert self._loaded.loss is not None
        with autocast(self._loaded):
            return self._loaded.loss(self._loaded.model, inputs)

    @property
    def _step(self) -> MicroStep:
        return self._loaded.micro_step()

    def _captured_step(self, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """As :meth:`compute_loss` and a backward, through the loaded model's step; nothing waits for the card."""
        if not self.model.training:
            self.model.train()
        self._enter("step")
        inputs = self._prepare_inputs(inputs)
        scaler = self.accelerator.scaler
        one = self._one if scaler is None else scaler.scale(self._one)
        return self._step(inputs, one / count) / count

    def get_train_dataloader(self) -> Any:
        """The loader, its batches in few shapes where steps are captured."""
        collate = self.data_collator
        if self._step.captures:
            self.data_collator = in_few_shapes(collate, self._step.fix)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def create_optimizer(self, model: Any = None) -> Any:
        """The loaded model's own, one launch for all adapters; Trainer's for what it does not know."""
        args, flat = self.args, self._adapters
        found = self.optimizer
        if found is None and flat is not None and not args.optim_args:
            found = self.optimizer = self._loaded.optimizer(
                learning_rate=args.learning_rate,
                optim=str(getattr(args.optim, "value", args.optim)),
                weight_decay=args.weight_decay,
                betas=(args.adam_beta1, args.adam_beta2),
                eps=args.adam_epsilon,
            )
        return super().create_optimizer(model) if found is None else found

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate; it counts the parameters anew for every batch, which takes longer than a small step."""
        if self._n_parameters is None:
            self._n_parameters = self.model.num_parameters(exclude_embeddings=True)
        return int(6 * inputs["input_ids"].numel() * self._n_parameters)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """The norm of all gradients, from one pass over their buffer, which is scaled down to ``max_grad_norm``."""
        flat = self._adapters
        if flat is None:
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        self.stepping.in_step(self.accelerator.unscale_gradients)
        self._norm = self.stepping.in_step(lambda: clip_(flat.all_gradients(), self.args.max_grad_norm))
        return torch.tensor(math.nan) if self._norm is None else self._norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss a supervised token over all eval rows, not over batches."""
        self._eval_sums = []
        # transformers calls on_evaluate inside, so the meter reads the sums when asked.
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact eval loss where trackers look for it."""
        if "eval_loss" in logs and self._eval_sums:
            own = sum(float(t) for t, _ in self._eval_sums), sum(int(n) for _, n in self._eval_sums)
            total, count = self._ranks.total(*own)
            self._meter.eval_loss = total / max(1, count)
            logs["eval_loss"] = self._meter.eval_loss
        super().log(logs, start_time)

    def release(self) -> None:
        """Undo what the trainer hung on the model, and let go of optimizer and data."""
        self.accelerator.free_memory()
        for holder in (self, self.callback_handler):
            holder.optimizer = holder.lr_scheduler = None
        self.callback_handler.train_dataloader = self.callback_handler.eval_dataloader = None
        self._micro_batches, self._eval_sums = [], []
        forget_in_bitsandbytes(self.model)
        restore_forwards(self._own_forwards)
        self.model.__dict__.pop("zero_grad", None)
        self.model.zero_grad(set_to_none=True)
