"""The same from a shell: ``nbqlora demo``, ``plan FILE.toml``, ``finetune FILE.toml``, ``merge``, ``vram``, ..."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nbqlora.core.errors import ConfigError, NbqloraError, Problem
from nbqlora.core.ranks import rank_of, see_one_card
from nbqlora.core.request import CellRequest, parse_toml

if TYPE_CHECKING:
    from nbqlora.core.events import Event

# What the demo trains: with these settings the three-line style is learned in one pass over 128 rows: 16 steps.
DEMO_OPTIONS: dict[str, Any] = {
    "model": "demo",
    "data": "demo",
    "max_length": 256,
    "effective_batch_size": 3,  # packs, of about three rows each
    "learning_rate": 2e-3,
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0,
    "lora_r": 8,
}
INTERRUPTED = 128 + signal.SIGINT
DEMO_PROMPTS = ("Why is the sky dark at night?", "How do magnets work?", "Should I learn to cook?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit status: 0 also for a run that was stopped and saved, 1 for an error, 130 for an interrupt that
        ended the command (a second one, or one before training).
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.do(parsed))
    except (NbqloraError, KeyboardInterrupt) as error:
        if parsed.traceback:
            raise
        told = isinstance(error, NbqloraError)
        print(f"{type(error).__name__}: {error}" if told else "interrupted", file=sys.stderr)
        return INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nbqlora", description="QLoRA on the memory you really have.")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="fine-tune the demo model on the demo data and compare answers")
    demo.add_argument("--fetch", action="store_true", help="only fetch the demo model (98 MB), for later")
    demo.add_argument("--output-dir", default="runs/demo", help="where the adapter goes (runs/demo)")
    demo.set_defaults(do=_demo)
    for name, do, what in (
        ("plan", _plan, "say what a run would do, without loading anything"),
        ("finetune", _finetune, "run a fine-tuning"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("file", type=Path, help="the options, as TOML: what a %%finetune cell holds")
        command.set_defaults(do=do)
        if name == "finetune":
            command.add_argument("--resume", action="store_true", help="go on from the run's furthest checkpoint")
        else:
            command.add_argument("--gpus", type=_cards, metavar="N", help="plan for N cards a machine, or all")
            command.add_argument("--nodes", type=_machines, default=1, metavar="M", help="and for M such machines (1)")
    _add_saving(commands)
    commands.add_parser("vram", help="memory now").set_defaults(do=_vram)
    doctor = commands.add_parser("doctor", help="say what would keep a run from working here; status 1 if anything")
    doctor.add_argument("model", nargs="?", help="a hub id, a folder or demo: could it be loaded?")
    doctor.add_argument("--output-dir", default=".", help="where a run would write (runs/NAME, from here)")
    doctor.set_defaults(do=_doctor)
    return parser


def _cards(text: str) -> int | str:
    if text != "all" and not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number of cards from 1, or all, got {text}")
    return text if text == "all" else int(text)


def _machines(text: str) -> int:
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a number of machines from 1, got {text}")
    return int(text)


def _add_saving(commands: Any) -> None:
    merge = commands.add_parser("merge", help="write base and adapter as one model that plain transformers loads")
    export = commands.add_parser("export", help="write base and adapter as one GGUF file, for llama.cpp")
    for command, what in ((merge, "the folder to write: new, or an earlier merge"), (export, "the file to write")):
        command.add_argument("adapter", nargs="+", type=Path, help="a run's folder, or an adapter's; several are added")
        command.add_argument("path", type=Path, help=what)
        command.add_argument("--model", help="the base, unless the adapter's own name for it will do")
        command.add_argument("--base", default="original", help="original (published), or nf4 (as training saw it)")
        command.add_argument("--maximum-memory-usage", type=float, default=0.9, help="share of free memory (0.9)")
        command.add_argument("--temporary-location", help="a folder for what does not fit that memory")
        command.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    merge.add_argument("--dtype", default="auto", help="auto, bf16, fp16 or fp32")
    merge.add_argument("--max-shard-size", default="5GB", help="of one file (5GB)")
    merge.add_argument("--no-check", action="store_true", help="do not compare the result with base and adapter")
    merge.set_defaults(do=_merge)
    export.add_argument(
        "--quantization", default="Q8_0", help="F16, BF16, Q8_0, Q5_1, ...; with nbqlora[gguf] Q4_K_M, ..."
    )
    export.set_defaults(do=_export)


def _request(file: Path) -> CellRequest:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem(key=str(file), message=f"cannot be read: {error}")], "the command") from error
    return parse_toml(text, source=file.name)


def _print(event: Event) -> None:
    from nbqlora.view.text import event_line

    line = event_line(event)
    if line:
        print(line, flush=True)


def _demo(parsed: argparse.Namespace) -> int:
    if parsed.fetch:
        from nbqlora.hub.demo_model import demo_model

        print(f"the demo model is in {demo_model(print)}")
        return 0
    from nbqlora import api

    run = api.finetune(name="demo", observe=_print, output_dir=parsed.output_dir, **DEMO_OPTIONS)
    print(f"\n{run}\n\nThree questions that the data does not hold, before and after:\n", flush=True)
    print(run.compare(DEMO_PROMPTS, max_new_tokens=72))
    return 0


def _plan(parsed: argparse.Namespace) -> int:
    request = _request(parsed.file)
    if parsed.gpus is not None:
        request = replace(request, options={**request.options, "gpus": parsed.gpus})
    from nbqlora import api

    print(api.plan_request(request, name=parsed.file.stem, observe=_print, nodes=parsed.nodes))
    return 0


def _finetune(parsed: argparse.Namespace) -> int:
    request, rank = _request(parsed.file), rank_of(os.environ)
    see_one_card(rank, os.environ)
    from nbqlora import api

    observe = _print if rank.first else None
    run = api.finetune_request(request, name=parsed.file.stem, observe=observe, resume=parsed.resume)
    if not rank.first:
        return 0
    print(run)
    if run.status == "stopped":
        print(f"to go on from here: nbqlora finetune {parsed.file} --resume")
    return 0


def _saving(parsed: argparse.Namespace) -> dict[str, Any]:
    names = ("model", "base", "maximum_memory_usage", "temporary_location", "trust_remote_code")
    return {name: getattr(parsed, name) for name in names}


def _merge(parsed: argparse.Namespace) -> int:
    from nbqlora import api

    how = {"dtype": parsed.dtype, "max_shard_size": parsed.max_shard_size, "check": not parsed.no_check}
    report = api.merge(parsed.adapter, parsed.path, **_saving(parsed), **how)
    print(report)
    return 0 if report.check is None or report.check.agrees else 1


def _export(parsed: argparse.Namespace) -> int:
    from nbqlora import api

    print(api.export_gguf(parsed.adapter, parsed.path, parsed.quantization, **_saving(parsed)))
    return 0


def _vram(parsed: argparse.Namespace) -> int:
    from nbqlora import api

    print(api.vram())
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from nbqlora import api

    report = api.doctor(parsed.model, parsed.output_dir)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
