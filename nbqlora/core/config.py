"""Every option of a run, in one place, with its check and its default.

Names that TRL or PEFT already use are kept. What a plan can decide is ``None`` or ``"auto"`` here and may
be pinned. Everything wrong is collected and raised as one :class:`ConfigError`; nothing is corrected in
silence. Anything not listed goes through the ``trl`` and ``peft`` tables, checked against the real fields.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from nbqlora.core import checks as c
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.names import meant_by, table_problems, unknown_key
from nbqlora.core.plain import described, plain
from nbqlora.core.request import CellRequest, resolve


def _leaf(check: Callable[[Any], str], default: Any = MISSING) -> Any:
    metadata = {"check": check}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True, repr=False)
class FinetuneConfig:
    """The options of one run. Raises :class:`ConfigError` with every problem at once.

    Args:
        model: a hub id, a folder, or ``"demo"``.
        data: ``"demo"``, a file (JSONL, JSON, CSV, Parquet), a folder of them, a hub data set, a list of dicts, a
            DataFrame or a ``datasets.Dataset``.
        eval_data: the same for evaluation; None for none (the demo data brings its own).
        dtype: arithmetic: ``auto`` is bf16 from capability 8.0, fp16 below, fp32 on a CPU.
        vram_gib: the most that the run may allocate on the card (process RAM on a CPU); None = all that is free.
        ram_gib: the most host memory that inputs of layers may take which are offloaded from a card; 0 = none,
            None = half of what is free, with 3 GiB left.
        gpus: cards that train together, each with its share of every step's rows: None and 1 for one, ``"all"``, or
            how many. On a CPU so many processes, each with its share of the threads.
        fsdp: ``"auto"``: each card has the whole model where that fits, else the layers' NF4 weights are split over all
            cards that train together (FSDP2); True: split, or an error; False: never split.
        effective_batch_size: rows, or packs, per optimizer step of all cards; the plan splits it into cards, device
            batch and accumulation.
        max_minutes: stop, save and end after this long; None for no limit.
        save_minutes: write a checkpoint this often, 0 for only at a stop and at the end.
        packing: ``"auto"``: packs of whole rows where a probe shows that documents stay apart, else padding;
            True: packs, or an error; False: rows as they are, laid end to end.
        padding_free: False pads rows to the longest of their micro-batch; None and True lay them end to end.
        chat_template_path: a Jinja file, or ``"plain"``, for a tokenizer that has no chat template.
        gradient_checkpointing: ``"auto"`` (the plan's mix), ``"none"``/False, ``"full"``/True, ``"offload"``, or a
            table ``{keep = 22, recompute_mlp = 6, recompute = 4}`` of layers, which also takes ``offload`` and
            ``join``; what is left out of it is the rest.
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
    ram_gib: float | None = _leaf(c.optional(c.number(at_least=0)), None)
    gpus: int | str | None = _leaf(c.optional(c.how_many_cards), None)
    fsdp: bool | str = _leaf(c.whole_or_split, "auto")
    max_minutes: float | None = _leaf(c.optional(c.number(above=0)), None)
    save_minutes: float = _leaf(c.number(at_least=0), 5.0)
    effective_batch_size: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    per_device_train_batch_size: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    gradient_accumulation_steps: int | None = _leaf(c.optional(c.integer(at_least=1)), None)
    gradient_checkpointing: Any = _leaf(c.layer_policies, "auto")
    max_length: int = _leaf(c.integer(at_least=8), 1024)
    packing: bool | str = _leaf(c.auto_or_boolean, "auto")
    padding_free: bool | None = _leaf(c.optional(c.boolean), None)
    chat_template_path: str | None = _leaf(c.optional(c.text), None)
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
    seed: int = _leaf(c.integer(at_least=0, at_most=2**32 - 1), 42)
    report_to: str | tuple[str, ...] = _leaf(c.module_names, "none")
    trl: Mapping[str, Any] = field(default_factory=dict, metadata={"check": c.table})
    peft: Mapping[str, Any] = field(default_factory=dict, metadata={"check": c.table})

    def __post_init__(self) -> None:
        problems = []
        for f in fields(self):
            message = f.metadata["check"](getattr(self, f.name))
            if message:
                problems.append(Problem(key=f.name, message=message))
        wrong = {p.key for p in problems}
        problems += [] if wrong & {*BATCH_OPTIONS, "gpus"} else _batch_problems(self)
        problems += [] if wrong & {"packing", "padding_free"} else _layout_problems(self)
        if problems:
            raise ConfigError(problems)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values; data held in memory is described, not copied."""
        rows = {"data", "eval_data"}
        return {f.name: (described if f.name in rows else plain)(getattr(self, f.name)) for f in fields(self)}

    def __repr__(self) -> str:
        given = self.as_dict()
        pinned = [f for f in fields(self) if f.default is MISSING or getattr(self, f.name) is not f.default]
        shown = ", ".join(f"{f.name}={given[f.name]!r}" for f in pinned if given[f.name] != {})
        return f"FinetuneConfig({shown})"


DEFAULT_EFFECTIVE_BATCH_SIZE = 16
BATCH_OPTIONS = ("effective_batch_size", "per_device_train_batch_size", "gradient_accumulation_steps")


def _batch_problems(config: FinetuneConfig) -> list[Problem]:
    """What cannot be, with the cards that were asked for by their number; ``"all"`` is the planner's to check."""
    effective, batch, accumulation = (getattr(config, name) for name in BATCH_OPTIONS)
    if effective is None:
        return []
    asked = f"effective_batch_size is {effective}"
    cards = config.gpus if isinstance(config.gpus, int) else 1
    share = -(-effective // cards)  # where cards do not divide it, some have a row fewer
    if config.gpus == "all":
        return []
    if batch and accumulation:
        if batch * accumulation == share:
            return []
        many = f"{cards} cards x " if cards > 1 else ""
        given = f"{many}{batch} rows x {accumulation} accumulation steps = {batch * accumulation * cards}, but {asked}"
        return [Problem(key="effective_batch_size", message=given, hint="leave one of the three out")]
    parts = (("per_device_train_batch_size", batch), ("gradient_accumulation_steps", accumulation))
    wrong = [(name, part) for name, part in parts if part and share % part]
    asked += f", so {share} on each of {cards} cards" if cards > 1 else ""
    return [Problem(key=name, message=f"{part} does not divide {share}", hint=asked) for name, part in wrong]


def _layout_problems(config: FinetuneConfig) -> list[Problem]:
    if config.packing is not True or config.padding_free is not False:
        return []
    message = "packs are laid end to end, so there is nothing to pad"
    return [Problem(key="padding_free", message=message, hint="leave it out, or write packing = false")]


def validate(request: CellRequest, *, table_fields: Callable[[str], Mapping[str, c.Check]]) -> FinetuneConfig:
    """Check a request; nothing is loaded.

    Args:
        request: what was asked for.
        table_fields: the fields of SFTConfig (``"trl"``) and LoraConfig (``"peft"``), each with its check; called
            only for a table that is there, since it imports the library.

    Raises:
        ConfigError: everything that is wrong, with line numbers where the request knows them.
    """
    known = {f.name: f for f in fields(FinetuneConfig)}
    problems = [*request.problems, *(unknown_key(k, known, v) for k, v in request.options.items() if k not in known)]
    told = {p.key.split(".")[0] for p in problems}
    above = "at the top level" + (", above any [table]" if request.line_of else "")
    for table in ("trl", "peft"):
        given = request.options.get(table)
        if isinstance(given, Mapping) and given:
            problems += table_problems(table, resolve(given, request.mapping), table_fields(table), known, above)
    problems += [_missing(f.name) for f in fields(FinetuneConfig) if _required(f) and not _spoken_of(f.name, request)]
    fine = {k: resolve(v, request.mapping) for k, v in request.options.items() if k in known and k not in told}
    try:
        config = FinetuneConfig(**{"model": "demo", "data": "demo", **fine})
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(problems).located(request.line_of, request.source)
    return config


def _required(f: Field[Any]) -> bool:
    return f.default is MISSING and f.default_factory is MISSING


def _missing(name: str) -> Problem:
    return Problem(key=name, message="is missing", hint='for a first try write "demo"')


def _spoken_of(name: str, request: CellRequest) -> bool:
    """The option was written: as it is, unreadably, in a table, or under another name."""
    written = [*request.options, *(p.key for p in request.problems)]
    for table in ("trl", "peft"):
        given = request.options.get(table)
        written += map(str, given) if isinstance(given, Mapping) else []
    known = [f.name for f in fields(FinetuneConfig)]
    return any(meant_by(key, known) == name for key in written)
