"""Step 3: what is there. Config, tokenizer, rows and machine are looked at; no weights are read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import BatchLayout, DeviceSpec, ModelSpec
from nbqlora.data.encode import EncodedData, HandedRows, encode
from nbqlora.data.rows import DEMO, read_rows
from nbqlora.data.template import apply_chat_template_path
from nbqlora.hub.checkpoint import CHECKPOINTS_FOLDER, Checkpoint, find_checkpoints
from nbqlora.hub.demo_model import DEMO_NAME, demo_model
from nbqlora.hub.inspect import locate, read_spec, read_tokenizer
from nbqlora.memory.device import device_spec
from nbqlora.planner.cards import Cards
from nbqlora.run.layout import choose_layout
from nbqlora.run.places import default_output_dir, ephemeral_note
from nbqlora.run.preflight import Saving, check_download, preflight, where_to_save

HandedPair = tuple[HandedRows, HandedRows | None]


@dataclass(frozen=True, kw_only=True)
class Look:
    """Everything that a plan needs.

    Args:
        location: where the model's files are: a folder, or a hub id.
        output_dir: where the user wants the result.
        work_dir: where it is written first: ``output_dir`` itself, unless that is slow or may vanish.
        cards: what trains together; None for what ``gpus`` says.
    """

    location: str
    spec: ModelSpec
    tokenizer: Any
    train: EncodedData
    evaluation: EncodedData | None
    device: DeviceSpec
    output_dir: Path
    work_dir: Path
    notes: tuple[str, ...]
    cards: Cards | None = None

    def laid_out(self, layout: BatchLayout, because: str) -> Look:
        """The same with its rows laid out otherwise."""
        evaluation = None if self.evaluation is None else self.evaluation.with_layout(layout, because)
        return replace(self, train=self.train.with_layout(layout, because), evaluation=evaluation)

    def checkpoints(self) -> tuple[list[Checkpoint], list[str]]:
        """As :func:`find_checkpoints`, of both folders: the furthest first, of the same step this machine's."""
        folders = dict.fromkeys((self.work_dir, self.output_dir))
        there = [find_checkpoints(folder / CHECKPOINTS_FOLDER) for folder in folders]
        found = sorted((c for some, _ in there for c in some), key=lambda c: -c.step)
        return found, [line for _, unreadable in there for line in unreadable]


def look(
    config: FinetuneConfig,
    name: str,
    say: Callable[[str], None],
    device: DeviceSpec | None = None,
    rows: HandedPair | None = None,
) -> Look:
    """Look at model, data and machine.

    Args:
        name: the run's name, for its folder.
        say: takes a line of progress.
        device: the machine to plan for; None looks at this one.
        rows: to train on and to evaluate on, where another process read them.

    Raises:
        ConfigError: ``target_modules`` names no linear of this model, ``output_dir`` cannot be written, or a
            layout that was asked for mixes documents in this model.
        DeviceError: the card has no kernels here.
        ModelError, DataError: one of them cannot be read.
        OutOfDiskError: the download has no room, or what the run writes.
    """
    output_dir = Path(config.output_dir or default_output_dir(name)).expanduser()
    here = device is None
    notes = preflight(config, output_dir) if here else ()
    location = place_of(config, say)
    spec, saving = _model(config, location, output_dir, here=here)
    tokenizer, train, evaluation = _tokens(config, location, rows, say)
    _import_what_counts()
    return Look(
        location=location,
        spec=spec,
        tokenizer=tokenizer,
        train=train,
        evaluation=evaluation,
        device=device or replace(device_spec(str(output_dir)), rooms=saving.rooms),
        output_dir=output_dir,
        work_dir=saving.work_dir,
        notes=tuple(n for n in (ephemeral_note(output_dir.absolute(), os.environ), *saving.notes, *notes) if n),
    )


def _model(config: FinetuneConfig, location: str, output_dir: Path, *, here: bool) -> tuple[ModelSpec, Saving]:
    """The model's shapes, and where its run writes; on this machine only if download and files have room."""
    spec = read_spec(config.model, location, trust_remote_code=config.trust_remote_code)
    _check_targets(config, spec)
    if not here:
        return spec, Saving(work_dir=output_dir)
    check_download(spec)
    return spec, where_to_save(config, spec, output_dir)


def _tokens(
    config: FinetuneConfig, location: str, rows: HandedPair | None, say: Callable[[str], None]
) -> tuple[Any, EncodedData, EncodedData | None]:
    """The tokenizer and the rows, read here unless another process did."""
    tokenizer = tokenizer_of(config, location)
    layout = choose_layout(config, location)
    if rows is None:
        return tokenizer, *read_both(config, tokenizer, layout, say)
    train, evaluation = rows
    opened = None if evaluation is None else evaluation.opened().with_layout(*layout)
    return tokenizer, train.opened().with_layout(*layout), opened


def _import_what_counts() -> None:
    """On a CPU the process itself counts, with all libraries that the run will import."""
    if not torch.cuda.is_available():
        import nbqlora.train.trainer  # noqa: F401


def read_both(
    config: FinetuneConfig, tokenizer: Any, layout: tuple[BatchLayout, str], say: Callable[[str], None]
) -> tuple[EncodedData, EncodedData | None]:
    """Rows to train on, and to evaluate on; the demo data brings its own."""
    train = encoded(config, config.data, "train", tokenizer, layout, say)
    source = config.eval_data
    if source is None and isinstance(config.data, str) and config.data == DEMO:
        source = DEMO
    if source is None:
        return train, None
    evaluation = encoded(config, source, "eval", tokenizer, layout, say)
    stats = replace(train.stats, n_eval_rows=evaluation.stats.n_rows)
    return replace(train, stats=stats, report=replace(train.report, stats=stats)), evaluation


def place_of(config: FinetuneConfig, say: Callable[[str], None]) -> str:
    """Where the model's files are: a folder, or a hub id. Raises :class:`ModelError`."""
    return str(demo_model(say)) if config.model == DEMO_NAME else locate(config.model, say)


def tokenizer_of(config: FinetuneConfig, location: str) -> Any:
    """The model's tokenizer, with the chat template that was asked for. Raises ModelError, DataError."""
    tokenizer = read_tokenizer(location, trust_remote_code=config.trust_remote_code)
    apply_chat_template_path(tokenizer, config.chat_template_path)
    return tokenizer


def encoded(
    config: FinetuneConfig,
    source: Any,
    split: str,
    tokenizer: Any,
    layout: tuple[BatchLayout, str],
    say: Callable[[str], None],
) -> EncodedData:
    """Read, tokenize, count and lay out. Raises :class:`DataError`."""
    return encode(
        read_rows(source, split=split),
        tokenizer,
        max_length=config.max_length,
        assistant_only_loss=config.assistant_only_loss,
        layout=layout[0],
        say=say,
    ).with_layout(*layout)


def _check_targets(config: FinetuneConfig, spec: ModelSpec) -> None:
    asked = config.target_modules
    names = [asked] if isinstance(asked, str) else list(asked)
    missing = [n for n in names if n not in spec.linear_shapes and n != "all-linear" and "." not in n]
    if missing and spec.linear_shapes:
        has = ", ".join(spec.linear_shapes)
        message = f"this model has no linear named {', '.join(missing)}"
        raise ConfigError([Problem(key="target_modules", message=message, hint=f"it has {has}")])
