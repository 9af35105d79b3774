"""What people call an option elsewhere, and what the ``trl`` and ``peft`` tables do not take.

An unknown key always gets the nearest known one as a hint; a refused one gets the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from typing import Any

from nbqlora.core.errors import Problem

# How people spell it elsewhere -> the option's name here.
ALIASES = {
    "adapter_rank": "lora_r", "alpha": "lora_alpha", "base_model": "model", "batch_size": "effective_batch_size",
    "cutoff_len": "max_length", "dataset": "data", "dropout": "lora_dropout", "epochs": "num_train_epochs",
    "eval_dataset": "eval_data", "grad_accum": "gradient_accumulation_steps", "lora_rank": "lora_r",
    "fsdp2": "fsdp", "fully_shard": "fsdp", "shards": "fsdp",
    "gpu": "gpus", "n_gpus": "gpus", "num_gpus": "gpus", "num_processes": "gpus", "nproc_per_node": "gpus",
    "lr": "learning_rate", "lr_scheduler": "lr_scheduler_type", "max_seq_length": "max_length",
    "max_seq_len": "max_length", "micro_batch_size": "per_device_train_batch_size", "model_name": "model",
    "num_epochs": "num_train_epochs", "optimizer": "optim", "r": "lora_r", "rank": "lora_r",
    "ram": "ram_gib", "random_state": "seed", "sequence_len": "max_length", "steps": "max_steps", "train_data": "data",
    "train_dataset": "data", "vram": "vram_gib", "warmup": "warmup_ratio",
}  # fmt: skip

# Keys of TRL and PEFT that have an owner here, with what to write instead.
REFUSED_TRL = {
    "activation_checkpointing": "gradient_checkpointing at the top level decides it per layer",
    "activation_offloading": "gradient_checkpointing at the top level decides it per layer",
    "auto_find_batch_size": "the plan picks the batch before anything is loaded",
    "bf16": "write dtype", "fp16": "write dtype", "use_cpu": "the device is found by itself",
    "dataloader_drop_last": "rows would be left out in silence",
    "do_train": "a run always trains", "do_eval": "give eval_data",
    "load_best_model_at_end": "the adapter of the last step is saved",
    "logging_nan_inf_filter": "a loss that is not finite is always an error",
    "model_init_kwargs": "the model is loaded by nbqlora", "packing_strategy": "only bfd keeps documents apart",
    "push_to_hub": "call the finished run's push_to_hub(name)",
    "hub_token": "options are written to a file; log in with huggingface_hub.login()",
    "resume_from_checkpoint": "write --resume behind the run's name, or resume=True in Python",
    "save_steps": "checkpoints go by time; write save_minutes", "save_strategy": "write save_minutes",
    "save_only_model": "a checkpoint without its optimizer cannot be resumed exactly",
    "ignore_data_skip": "a resumed run would see rows twice",
    "torch_compile": "the first step must come within seconds", "use_liger_kernel": "it patches classes",
    "torch_compile_backend": "it switches torch_compile on", "torch_compile_mode": "it switches torch_compile on",
    "warmup_steps": "write warmup_ratio",
    "completion_only_loss": "write assistant_only_loss", "dataset_kwargs": "rows are tokenized by nbqlora",
    "dataset_num_proc": "rows are tokenized by nbqlora", "dataset_text_field": "rows are tokenized by nbqlora",
    "eval_packing": "packing decides it for both", "truncation_mode": "rows are cut at their end",
    "loss_type": "only the likelihood loss is implemented",
    "label_smoothing_factor": "only the likelihood loss is implemented",
    "fsdp_config": "only the layers' NF4 weights are ever split; fsdp at the top level says whether",
    "deepspeed": "gpus trains on several cards, and fsdp splits a model over them",
    "parallelism_config": "gpus trains on several cards, and fsdp splits a model over them",
    "ddp_backend": "gpus starts the processes, with NCCL between cards and gloo between CPUs",
    "ddp_timeout": "ranks wait 30 minutes for each other",
    **dict.fromkeys(
        ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_find_unused_parameters", "ddp_static_graph"),
        "adapters' gradients are added in one all-reduce, without DDP",
    ),
}  # fmt: skip
REFUSED_PEFT = {
    "r": "write lora_r", "task_type": "it is always CAUSAL_LM", "inference_mode": "a run trains",
    "modules_to_save": "full-size trainable copies are not planned for yet",
}  # fmt: skip


def unknown_key(key: str, known: Collection[str], value: Any = None) -> Problem:
    """An unknown option, with the one that was probably meant; ``value`` is a mapping where a table was written."""
    if isinstance(value, Mapping):
        return Problem(key=key, message="unknown table", hint="there are [trl] and [peft]; other options stand above")
    meant = meant_by(key, known)
    return Problem(key=key, message="unknown key", hint=f"did you mean {meant}?" if meant else "")


def meant_by(key: str, known: Collection[str]) -> str:
    """The option that ``key`` is another word for, or is closest to; "" for none."""
    spelled = key.lower().replace("-", "_")
    if spelled in known:
        return spelled
    if spelled in ALIASES:
        return ALIASES[spelled]
    return next(iter(get_close_matches(spelled, known, n=1, cutoff=0.6)), "")


def table_problems(
    table: str, given: Mapping[Any, Any], checks: Mapping[str, Callable[[Any], str]], known: Collection[str], above: str
) -> list[Problem]:
    """What is wrong with the keys and values of ``trl`` or ``peft``.

    Args:
        given: the table as written.
        checks: fields of the library's config class, each with what is wrong with a value; "" for nothing.
        known: the options of the top level.
        above: where those stand, in words ("at the top level").
    """
    refused = REFUSED_TRL if table == "trl" else REFUSED_PEFT
    problems = []
    for key, value in ((str(k), v) for k, v in given.items()):
        where = f"{table}.{key}"
        if key in known:
            problems.append(Problem(key=where, message="is an option of its own", hint=f"write {key} {above}"))
        elif key in refused:
            problems.append(Problem(key=where, message="is not accepted", hint=refused[key]))
        elif key not in checks:
            problems.append(_unknown_field(table, key, [n for n in checks if n not in refused], known, above))
        elif message := checks[key](value):
            problems.append(Problem(key=where, message=message))
    return problems


def _unknown_field(table: str, key: str, names: list[str], known: Collection[str], above: str) -> Problem:
    close = get_close_matches(key, sorted({*names, *known}), n=1, cutoff=0.6)
    meant = ALIASES[key] if key in ALIASES else next(iter(close), "")
    hint = f"did you mean {meant} {above}?" if meant in known else f"did you mean {table}.{meant}?"
    return Problem(key=f"{table}.{key}", message="unknown key", hint=hint if meant else "")
