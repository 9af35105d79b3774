"""``SFTTrainer`` with our loss, fp32 adapters, exact token counts and a stop at the first NaN.

What TRL does and we take back, each on the instance: it casts quantized LoRA to bf16 in its constructor
(GradScaler then dies on fp16 cards, and resume is not exact), and it replaces the base's ``forward``.
GradScaler starts at 2**16 by default, which throws away the first steps of a run; ours starts at 2**10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from nbqlora.core.errors import NonFiniteLossError
from nbqlora.engine.adapters import FlatAdapters
from nbqlora.engine.fused import engine_of
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.train.batch import MicroBatch, count_tokens, documents, in_few_shapes
from nbqlora.train.events import StepMeter
from nbqlora.train.interruptible import InterruptibleTrainer
from nbqlora.train.resumable import ResumableTrainer, SaveState
from nbqlora.train.sent import SentNumbers, clip_
from nbqlora.train.traces import forget_in_bitsandbytes, instance_forwards, restore_forwards

INITIAL_LOSS_SCALE = 2.0**10

# documents' token ids -> numbers of the rows they came from
FindRows = Callable[[list[list[int]]], tuple[int, ...]]


class QLoraTrainer(InterruptibleTrainer, ResumableTrainer):
    """TRL's trainer on a loaded model.

    Args:
        loaded: model, tokenizer, loss, device and dtype.
        meter: filled for the event callback.
        find_rows: names the rows of a failing batch.
        save_state: takes the state at each checkpoint.
    """

    data_collator: Any
    optimizer: Any

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
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._loaded, self._meter, self._find_rows = loaded, meter, find_rows
        assert loaded.loss is not None
        self._loss, self._step = loaded.loss, loaded.micro_step()
        self._one = torch.ones((), device=loaded.device)
        self._norm: torch.Tensor | None = None
        self._n_parameters: int | None = None
        self._adapters = self._all_adapters()
        self._micro_batches: list[MicroBatch] = []
        self._eval_sums: list[tuple[torch.Tensor, torch.Tensor]] = []
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
            callbacks=[_FiniteCallback(self), *callbacks],
        )
        for name, p in loaded.model.named_parameters():
            if name in exact:
                p.data = exact[name]
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if self._adapters is not None:
            # Trainer clears gradients through the model, which looks at every module for them: 8 ms of a 1B model.
            loaded.model.zero_grad = self._adapters.clear_gradients
        if arguments.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler(loaded.device.type, init_scale=INITIAL_LOSS_SCALE)

    def _all_adapters(self) -> FlatAdapters | None:
        engine = engine_of(self._loaded.model)
        adapters = None if engine is None else engine.scratch.adapters
        return adapters if adapters is not None and all(p in adapters for p in self._loaded.trainable()) else None

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss a supervised token of the whole step: the sum here over the step's number of tokens."""
        with autocast(self._loaded):
            total, count = self._loss(self._loaded.model, inputs)
        if not self.model.training:
            self._eval_sums.append((total.detach(), count))
        loss = total / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return (loss, {}) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """One micro-batch, remembered until the step is known to be finite."""
        if self._step.captures and num_items_in_batch is not None:
            loss = self._captured_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(MicroBatch(inputs=inputs, loss=loss))
        return loss

    def _captured_step(self, model: Any, inputs: dict[str, Any], count: Any) -> torch.Tensor:
        """As :meth:`compute_loss` and a backward, through the loaded model's step; nothing waits for the card."""
        if not model.training:
            model.train()
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
        args, flat = self.args, self._flat()
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

    def _flat(self) -> FlatAdapters | None:
        """The buffer behind the adapters, when nothing else trains."""
        return self._adapters

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Trainer's estimate; it counts the parameters anew for every batch, which takes longer than a small step."""
        if self._n_parameters is None:
            self._n_parameters = self.model.num_parameters(exclude_embeddings=True)
        return int(6 * inputs["input_ids"].numel() * self._n_parameters)

    def _clip_grad_norm(self, model: Any) -> torch.Tensor:
        """The norm of all gradients, from one pass over their buffer, which is scaled down to ``max_grad_norm``."""
        flat = self._flat()
        if flat is None:
            norm: torch.Tensor = super()._clip_grad_norm(model)
            return norm
        self.accelerator.unscale_gradients()
        self._norm = clip_(flat.all_gradients(), self.args.max_grad_norm)
        return self._norm

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Mean loss a supervised token over all eval rows, not over batches."""
        self._eval_sums = []
        # transformers calls on_evaluate inside, so the meter reads the sums when asked.
        return super().evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put the exact eval loss where trackers look for it."""
        if "eval_loss" in logs and self._eval_sums:
            total = sum(float(t) for t, _ in self._eval_sums)
            self._meter.eval_loss = total / max(1, sum(int(n) for _, n in self._eval_sums))
            logs["eval_loss"] = self._meter.eval_loss
        super().log(logs, start_time)

    def check_finite(self) -> None:
        """Before the optimizer's step: read the step's loss once; stop before a NaN reaches the adapter.

        Where steps are captured nothing is read: the optimizer is told on the card to leave the adapter alone if a
        figure is not finite, and the figures are read a step later.

        Raises:
            NonFiniteLossError: naming the rows, with the adapter as the last good step left it.
        """
        batches, self._micro_batches = self._micro_batches, []
        losses = torch.stack([b.loss for b in batches])
        n_tokens = sum(count_tokens(b.inputs) for b in batches)
        if self._reads_later():
            self._meter.numbers = self._sent(batches, losses, n_tokens)
            return
        self._meter.loss, self._meter.n_tokens = float(losses.sum()), n_tokens
        scaled = self.accelerator.scaler is not None
        if math.isfinite(self._meter.loss) and (scaled or self._gradients_are_finite()):
            return
        self._not_finite(batches, losses.tolist(), self.state.global_step)

    def _reads_later(self) -> bool:
        """Figures may come a step late: steps are captured, no tracker waits, and the optimizer can skip by itself."""
        fused = isinstance(getattr(self.optimizer, "optimizer", self.optimizer), torch.optim.AdamW)
        return self._step.captures and fused and self._flat() is not None and not self.args.report_to

    def _sent(self, batches: list[MicroBatch], losses: torch.Tensor, n_tokens: int) -> SentNumbers:
        flat = self._flat()
        assert flat is not None
        norm, self._norm = self._norm, None
        norm = torch.linalg.vector_norm(flat.all_gradients()) if norm is None else norm
        figures = torch.cat([losses.float(), norm.float().reshape(1)])
        scaled = self.accelerator.scaler is not None
        if not scaled:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(figures).all()).float()
        step = self.state.global_step
        return SentNumbers(
            figures,
            n_tokens,
            norm_may_be_infinite=scaled,
            fail=lambda found: self._not_finite(batches, found, step),
        )

    def _not_finite(self, batches: list[MicroBatch], losses: Sequence[float], last_step: int) -> NoReturn:
        bad = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)] or batches
        rows = self._find_rows([ids.tolist() for b in bad for ids in self._failing_documents(b.inputs)])
        raise NonFiniteLossError(_not_finite(math.isfinite(sum(losses)), last_step, rows))

    def _failing_documents(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Token ids of the documents whose own loss is not finite; of all when each alone is fine."""
        found = documents(inputs)
        with torch.no_grad(), autocast(self._loaded):
            losses = [
                self._loss(self._loaded.model, {"input_ids": ids[None], "labels": labels[None]})[0]
                for ids, labels in found
            ]
        bad = [ids for (ids, _), loss in zip(found, losses, strict=True) if not math.isfinite(float(loss))]
        return bad or [ids for ids, _ in found]

    def _gradients_are_finite(self) -> bool:
        flat = self._flat()
        if flat is not None:
            return bool(torch.isfinite(torch.linalg.vector_norm(flat.all_gradients())))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

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


class _FiniteCallback(TrainerCallback):
    """Calls the check at the one moment between gradients and optimizer."""

    def __init__(self, trainer: QLoraTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients of the step are there, clipped; nothing was updated yet."""
        self._trainer.check_finite()


def _not_finite(loss_is_finite: bool, last_step: int, rows: Sequence[int]) -> str:
    what, where = "gradient" if loss_is_finite else "loss", ", ".join(map(str, rows)) or "(not found)"
    kept = f"the adapter of step {last_step} was kept" if last_step else "no step was taken before it"
    return (
        f"the {what} of step {last_step + 1} is not finite, on the data's rows {where}; {kept}\n"
        "  look at these rows; if they are fine, a smaller learning_rate helps"
    )
