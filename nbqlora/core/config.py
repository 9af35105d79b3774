"""Every option of a run, in one place, with its check and its default.

Names that TRL or PEFT already use are kept. What a plan can decide is ``None`` or ``"auto"`` here and may
be pinned. Everything wrong is collected and raised as one :class:`ConfigError`; nothing is corrected in
silence. Anything not listed goes through the ``trl`` and ``peft`` tables, checked against the real fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from typing import Any

from nbqlora.core import checks as c
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.request import CellRequest

# How people spell it elsewhere -> the option's name here.
ALIASES = {
    "adapter_rank": "lora_r", "alpha": "lora_alpha", "base_model": "model", "batch_size": "effective_batch_size",
    "cutoff_len": "max_length", "dataset": "data", "dropout": "lora_dropout", "epochs": "num_train_epochs",
    "eval_dataset": "eval_data", "grad_accum": "gradient_accumulation_steps", "lora_rank": "lora_r",
    "lr": "learning_rate", "lr_scheduler": "lr_scheduler_type", "max_seq_length": "max_length",
    "max_seq_len": "max_length", "micro_batch_size": "per_device_train_batch_size", "model_name": "model",
    "num_epochs": "num_train_epochs", "optimizer": "optim", "r": "lora_r", "rank": "lora_r",
    "random_state": "seed", "sequence_len": "max_length", "steps": "max_steps", "train_data": "data",
    "train_dataset": "data", "vram": "vram_gib", "warmup": "warmup_ratio",
}  # fmt: skip

# Keys of TRL and PEFT that have an owner here, with what to write instead.
REFUSED_TRL = {
    "activation_checkpointing": "gradient_checkpointing at the top level decides it per layer",
    "activation_offloading": "gradient_checkpointing at the top level decides it per layer",
    "auto_find_batch_size": "the plan picks the batch before anything is loaded",
    "bf16": "write dtype", "fp16": "write dtype", "use_cpu": "the device is found by itself",
    "do_train": "a run always trains", "do_eval": "give eval_data",
    "load_best_model_at_end": "the adapter of the last step is saved",
    "model_init_kwargs": "the model is loaded by nbqlora", "packing_strategy": "only bfd keeps documents apart",
    "resume_from_checkpoint": "write output_dir; a run saves its adapter at its end",
    "save_steps": "a run saves its adapter at its end", "save_strategy": "a run saves its adapter at its end",
    "torch_compile": "the first step must come within seconds", "use_liger_kernel": "it patches classes",
    "warmup_steps": "write warmup_ratio", "chat_template_path": "the tokenizer's own template is used",
    "completion_only_loss": "write assistant_only_loss", "dataset_kwargs": "rows are tokenized by nbqlora",
    "dataset_text_field": "rows are tokenized by nbqlora", "loss_type": "only the likelihood loss is implemented",
    "label_smoothing_factor": "only the likelihood loss is implemented", "fsdp": "one card for now",
    "deepspeed": "one card for now",
}  # fmt: skip
REFUSED_PEFT = {
    "r": "write lora_r", "task_type": "it is always CAUSAL_LM", "inference_mode": "a run trains",
    "modules_to_save": "full-size trainable copies are not planned for yet",
}  # fmt: skip


def _leaf(check: Callable[[Any], str], default: Any = MISSING) -> Any:
    metadata = {"check": check}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """The options of one run. Raises :class:`ConfigError` with every problem at once.

    Args:
        model: a hub id, a folder, or ``"demo"``.
        data: ``"demo"``, a file (JSONL), a hub data set, a list of dicts, a DataFrame or a ``datasets.Dataset``.
        eval_data: the same for evaluation; None for none (the demo data brings its own).
        dtype: arithmetic: ``auto`` is bf16 from capability 8.0, fp16 below, fp32 on a CPU.
        vram_gib: the most that the run may allocate on the card (process RAM on a CPU); None = all that is free.
        effective_batch_size: rows, or packs, per optimizer step; the plan splits it into device batch and
            accumulation.
        max_minutes: stop, save and end after this long; None for no limit.
        gradient_checkpointing: ``"auto"`` (the plan's mix), ``"none"``/False, ``"full"``/True, or a table
            ``{keep = 22, recompute = 10}`` of layers.
        trl, peft: further fields of SFTConfig and LoraConfig.
    """

    model: str = _leaf(c.text)
    data: Any = _leaf(c.rows_source)
    eval_data: Any = _leaf(c.optional(c.rows_source), None)
    output_dir: str | None = _leaf(c.optional(c.text), None)
    dtype: str = _leaf(c.one_of("auto", "bf16", "fp16", "fp32"), "auto")
    load_in_4bit: bool = _leaf(c.boolean, True)
    trust_remote_code: bool = _leaf(c.boolean, False)
    vram_gib: float | None = _leaf(c.optional(c.number(above=0)), None)
    max_minutes: float | None = _leaf(c.optional(c.number(above=0)), None)
    effective_batch_size: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    per_device_train_batch_size: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    gradient_accumulation_steps: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    gradient_checkpointing: Any = _leaf(c.layer_policies, "auto")
    max_length: int = _leaf(c.integer(at_least=8), 1024)
    packing: bool = _leaf(c.boolean, False)
    assistant_only_loss: bool = _leaf(c.boolean, True)
    num_train_epochs: float = _leaf(c.number(above=0), 1.0)
    max_steps: int = _leaf(c.steps, -1)
    learning_rate: float = _leaf(c.number(above=0, below=1), 2e-4)
    lr_scheduler_type: str = _leaf(
        c.one_of("linear", "cosine", "constant", "constant_with_warmup", "polynomial", "inverse_sqrt"), "linear"
    )
    warmup_ratio: float = _leaf(c.number(at_least=0, below=1), 0.03)
    weight_decay: float = _leaf(c.number(at_least=0), 0.0)
    max_grad_norm: float = _leaf(c.number(at_least=0), 1.0)
    optim: str = _leaf(c.optimizer, "adamw_torch_fused")
    lora_r: int = _leaf(c.integer(at_least=1), 16)
    lora_alpha: float = _leaf(c.number(above=0), 16)
    lora_dropout: float = _leaf(c.number(at_least=0, below=1), 0.0)
    target_modules: str | tuple[str, ...] = _leaf(c.module_names, "all-linear")
    seed: int = _leaf(c.integer(at_least=0), 42)
    report_to: str | tuple[str, ...] = _leaf(c.module_names, "none")
    trl: Mapping[str, Any] = field(default_factory=dict, metadata={"check": c.table})
    peft: Mapping[str, Any] = field(default_factory=dict, metadata={"check": c.table})

    def __post_init__(self) -> None:
        problems = []
        for f in fields(self):
            message = f.metadata["check"](getattr(self, f.name))
            if message:
                problems.append(Problem(key=f.name, message=message))
        problems += _batch_problems(self) if not problems else []
        if problems:
            raise ConfigError(problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; data held in memory is described, not copied."""
        return {f.name: c.plain(getattr(self, f.name)) for f in fields(self)}


DEFAULT_EFFECTIVE_BATCH_SIZE = 16


def _batch_problems(config: FinetuneConfig) -> list[Problem]:
    batch, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    effective = config.effective_batch_size
    if effective is None or (batch is None and accumulation is None):
        return []
    asked = f"effective_batch_size is {effective}"
    if batch and accumulation and batch * accumulation != effective:
        given = f"{batch} rows x {accumulation} accumulation steps = {batch * accumulation}, but {asked}"
        return [Problem(key="effective_batch_size", message=given, hint="leave one of the three out")]
    for name, part in (("per_device_train_batch_size", batch), ("gradient_accumulation_steps", accumulation)):
        if part and effective % part:
            return [Problem(key=name, message=f"{part} does not divide {effective}", hint=f"{asked}")]
    return []


def validate(
    request: CellRequest,
    *,
    table_fields: Callable[[str], frozenset[str]],
) -> FinetuneConfig:
    """Check a request; nothing is loaded.

    Args:
        request: what was asked for.
        table_fields: names of the fields of SFTConfig (``"trl"``) and LoraConfig (``"peft"``); called only
            for a table that is there, since it imports the library.

    Raises:
        ConfigError: everything that is wrong, with line numbers where the request knows them.
    """
    known = {f.name: f for f in fields(FinetuneConfig)}
    problems = [*request.problems]
    problems += [_unknown(key, list(known)) for key in request.options if key not in known]
    unreadable = {p.key for p in problems}
    for name, f in known.items():
        if (
            name not in request.options
            and name not in unreadable
            and f.default is MISSING
            and f.default_factory is MISSING
        ):
            hint = 'for a first try write "demo"'
            problems.append(Problem(key=name, message="is missing", hint=hint))
    for table, refused in (("trl", REFUSED_TRL), ("peft", REFUSED_PEFT)):
        given = request.options.get(table)
        if isinstance(given, Mapping) and given:
            problems += _table_problems(table, given, refused, table_fields(table), set(known))
    values = {k: _value(v, request.mapping) for k, v in request.options.items() if k in known}
    config = None
    try:
        config = FinetuneConfig(**{"model": "demo", "data": "demo", **values})
    except ConfigError as error:
        problems += error.problems
    if problems or config is None:
        located = [_locate(p, request.line_of) for p in problems]
        raise ConfigError(sorted(located, key=lambda p: p.line or 0), request.source)
    return config


def _value(value: Any, mapping: Mapping[str, Any]) -> Any:
    if isinstance(value, str) and value in mapping:
        return mapping[value]
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _locate(problem: Problem, line_of: Mapping[str, int]) -> Problem:
    line = problem.line if problem.line is not None else line_of.get(problem.key)
    return Problem(key=problem.key, message=problem.message, hint=problem.hint, line=line)


def _unknown(key: str, names: list[str], prefix: str = "") -> Problem:
    close = [ALIASES[key]] if key in ALIASES and not prefix else get_close_matches(key, names, n=1, cutoff=0.6)
    hint = f"did you mean {prefix}{close[0]}?" if close else ""
    return Problem(key=prefix + key, message="unknown key", hint=hint)


def _table_problems(
    table: str, given: Mapping[str, Any], refused: Mapping[str, str], names: frozenset[str], known: set[str]
) -> list[Problem]:
    problems = []
    for key in given:
        where = f"{table}.{key}"
        if key in known:
            problems.append(Problem(key=where, message="is an option of its own", hint=f"write {key} at the top level"))
        elif key in refused:
            problems.append(Problem(key=where, message="is not accepted", hint=refused[key]))
        elif key not in names:
            problems.append(_unknown(key, sorted(names), f"{table}."))
    return problems
