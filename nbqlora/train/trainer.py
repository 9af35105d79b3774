"""``SFTTrainer`` with our loss, fp32 adapters, exact token counts and a stop at the first NaN.

What TRL does and we take back, each on the instance: it casts quantized LoRA to bf16 in its constructor
(GradScaler then dies on fp16 cards, and resume is not exact), and it replaces the base's ``forward``.
GradScaler starts at 2**16 by default, which throws away the first steps of a run; ours starts at 2**10.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, NonFiniteLossError, Problem
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout
from nbqlora.engine.head import LossFunction
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.train.batch import MicroBatch, count_tokens, documents
from nbqlora.train.events import StepMeter
from nbqlora.train.interruptible import InterruptibleTrainer
from nbqlora.train.resumable import ResumableTrainer, SaveState
from nbqlora.train.traces import forget_in_bitsandbytes, instance_forwards, restore_forwards

INITIAL_LOSS_SCALE = 2.0**10

# documents' token ids -> numbers of the rows they came from
FindRows = Callable[[list[list[int]]], tuple[int, ...]]


# Each layer's own policy decides, the data comes ready, and saving and showing are ours.
OURS = {
    "gradient_checkpointing": False,
    "dataset_kwargs": {"skip_prepare_dataset": True},
    "max_length": None,
    "packing": False,
    "save_strategy": "no",
    "prediction_loss_only": True,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "disable_tqdm": True,
}
SAME_NAME = (
    "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "optim",
    "seed",
)  # fmt: skip


def trainer_arguments(config: FinetuneConfig, plan: Plan, has_eval: bool) -> SFTConfig:
    """The SFTConfig of a run: the plan's numbers, the user's settings, and nothing that saves or prints.

    Raises:
        ConfigError: TRL refuses a value of the table ``trl``.
    """
    on_cpu = plan.device.kind == "cpu"
    settings: dict[str, Any] = {
        **OURS,
        **{name: getattr(config, name) for name in SAME_NAME},
        "output_dir": plan.output_dir,
        "per_device_train_batch_size": plan.micro_batch_size,
        "per_device_eval_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "warmup_steps": config.warmup_ratio,
        "bf16": plan.dtype == "bf16",
        "fp16": plan.dtype == "fp16",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        "padding_free": plan.data.layout is not BatchLayout.PADDED,
        "eval_strategy": "epoch" if has_eval else "no",
        "eval_on_start": has_eval,
        "report_to": config.report_to if isinstance(config.report_to, str) else list(config.report_to),
    }
    try:
        arguments = SFTConfig(**{**settings, **config.trl})
    except (ValueError, TypeError) as error:
        raise _refused("trl", str(error).splitlines()[0]) from None
    if not has_eval and arguments.eval_strategy != "no":
        raise _refused("trl.eval_strategy", "there is nothing to evaluate on; give eval_data")
    return arguments


def _refused(key: str, message: str) -> ConfigError:
    return ConfigError([Problem(key=key, message=message)])


class QLoraTrainer(InterruptibleTrainer, ResumableTrainer):
    """TRL's trainer on a loaded model.

    Args:
        loaded: model, tokenizer, device and dtype.
        loss: sum of losses and number of supervised tokens of a batch.
        meter: filled for the event callback.
        find_rows: names the rows of a failing batch.
        save_state: takes the state at each checkpoint.
    """

    def __init__(
        self,
        *,
        loaded: LoadedModel,
        arguments: SFTConfig,
        train_dataset: Any,
        eval_dataset: Any | None,
        loss: LossFunction,
        meter: StepMeter,
        find_rows: FindRows,
        save_state: SaveState,
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._loaded, self._loss, self._meter, self._find_rows = loaded, loss, meter, find_rows
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
        if arguments.fp16 and self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler(loaded.device.type, init_scale=INITIAL_LOSS_SCALE)

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
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._micro_batches.append(MicroBatch(inputs=inputs, loss=loss))
        return loss

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

        Raises:
            NonFiniteLossError: naming the rows, with the adapter as the last good step left it.
        """
        batches, self._micro_batches = self._micro_batches, []
        losses = torch.stack([b.loss for b in batches])
        self._meter.loss = float(losses.sum())
        self._meter.n_tokens = sum(count_tokens(b.inputs) for b in batches)
        scaled = self.accelerator.scaler is not None
        if math.isfinite(self._meter.loss) and (scaled or self._gradients_are_finite()):
            return
        bad = [b for b, loss in zip(batches, losses.tolist(), strict=True) if not math.isfinite(loss)] or batches
        rows = self._find_rows([ids.tolist() for b in bad for ids in self._failing_documents(b.inputs)])
        raise NonFiniteLossError(_not_finite(math.isfinite(self._meter.loss), self.state.global_step, rows))

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
