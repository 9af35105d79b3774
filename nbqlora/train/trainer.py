"""``SFTTrainer`` with our loss, fp32 adapters, exact token counts and a stop at the first NaN.

What TRL does and we take back, each on the instance: it casts quantized LoRA to bf16 in its constructor
(GradScaler then dies on fp16 cards, and resume is not exact), and it replaces the base's ``forward``.
GradScaler starts at 2**16 by default, which throws away the first steps of a run; ours starts at 2**10.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import NonFiniteLossError
from nbqlora.core.plan import Plan
from nbqlora.engine.head import LossFunction
from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.train.events import StepMeter

INITIAL_LOSS_SCALE = 2.0**10

# documents' token ids -> numbers of the rows they came from
FindRows = Callable[[list[list[int]]], tuple[int, ...]]


def trainer_arguments(config: FinetuneConfig, plan: Plan, has_eval: bool) -> SFTConfig:
    """The SFTConfig of a run: the plan's numbers, the user's settings, and nothing that saves or prints."""
    on_cpu = plan.device.kind == "cpu"
    settings: dict[str, Any] = {
        "output_dir": plan.output_dir,
        "per_device_train_batch_size": plan.micro_batch_size,
        "per_device_eval_batch_size": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": config.optim,
        "seed": config.seed,
        "bf16": plan.dtype == "bf16",
        "fp16": plan.dtype == "fp16",
        "use_cpu": on_cpu,
        "dataloader_pin_memory": not on_cpu,
        # Each layer's own policy decides, the data comes ready, and saving is ours.
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "packing": False,
        "padding_free": config.packing,
        "save_strategy": "no",
        "eval_strategy": "epoch" if has_eval else "no",
        "eval_on_start": has_eval,
        "prediction_loss_only": True,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "report_to": config.report_to if isinstance(config.report_to, str) else list(config.report_to),
    }
    return SFTConfig(**{**settings, **config.trl})


@dataclass(kw_only=True)
class _MicroBatch:
    """What is needed to name the rows of a batch whose loss is not finite."""

    inputs: dict[str, Any]
    loss: torch.Tensor


class QLoraTrainer(SFTTrainer):
    """TRL's trainer on a loaded model.

    Args:
        loaded: model, tokenizer, device and dtype.
        loss: sum of losses and number of supervised tokens of a batch.
        meter: filled for the event callback.
        find_rows: names the rows of a failing batch.
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
        callbacks: Sequence[TrainerCallback],
    ) -> None:
        self._loaded, self._loss, self._meter, self._find_rows = loaded, loss, meter, find_rows
        self._micro_batches: list[_MicroBatch] = []
        self._eval_sums: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._own_forwards = _instance_forwards(loaded.model)
        exact = {name: p.data for name, p in loaded.model.named_parameters() if p.requires_grad}
        arguments._n_gpu = 1  # with two cards Trainer would wrap the model in DataParallel
        super().__init__(
            model=loaded.model,
            args=arguments,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=loaded.tokenizer,
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
        self._micro_batches.append(_MicroBatch(inputs=inputs, loss=loss))
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
        self._meter.n_tokens = sum(_n_tokens(b.inputs) for b in batches)
        scaled = self.accelerator.scaler is not None
        if math.isfinite(self._meter.loss) and (scaled or self._gradients_are_finite()):
            return
        bad = [b for b, loss in zip(batches, losses.tolist(), strict=True) if not math.isfinite(loss)] or batches
        rows = self._find_rows([d for b in bad for d in _documents(b.inputs)])
        what = "loss" if not math.isfinite(self._meter.loss) else "gradient"
        raise NonFiniteLossError(
            f"the {what} of step {self.state.global_step + 1} is not finite, on the data's rows "
            f"{', '.join(map(str, rows)) or '(not found)'}; the adapter of step {self.state.global_step} was kept\n"
            "  look at these rows; if they are fine, a smaller learning_rate helps"
        )

    def _gradients_are_finite(self) -> bool:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    def release(self) -> None:
        """Undo what the trainer hung on the model, and let go of optimizer and data."""
        self.accelerator.free_memory()
        self.optimizer = self.lr_scheduler = None
        self._micro_batches, self._eval_sums = [], []
        for module, own in self._own_forwards.items():
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
            module.__dict__.pop("_original_forward", None)
        self.model.zero_grad(set_to_none=True)


class _FiniteCallback(TrainerCallback):
    """Calls the check at the one moment between gradients and optimizer."""

    def __init__(self, trainer: QLoraTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients of the step are there, clipped; nothing was updated yet."""
        self._trainer.check_finite()


def _instance_forwards(model: Any) -> dict[Any, Any]:
    """The ``forward`` that each of the two outer modules carries on the instance, None for its class's own."""
    return {m: m.__dict__.get("forward") for m in (model, model.get_base_model())}


def _n_tokens(inputs: dict[str, Any]) -> int:
    mask = inputs.get("attention_mask")
    return int(inputs["input_ids"].numel() if mask is None else mask.sum())


def _documents(inputs: dict[str, Any]) -> list[list[int]]:
    """Token ids of each document of a batch, padding and pack boundaries taken away."""
    ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None:
        return [row[m.bool()].tolist() for row, m in zip(ids, mask, strict=True)]
    if positions is None:
        return [row.tolist() for row in ids]
    starts = [*(positions[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    return [ids[0, a:b].tolist() for a, b in itertools.pairwise(starts)]
