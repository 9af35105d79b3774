"""A run's settings as TRL's: the plan's numbers, the user's options, and nothing that saves or prints."""

from __future__ import annotations

from typing import Any

from trl import SFTConfig

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout

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
        "accelerator_config": {"non_blocking": not on_cpu},
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
