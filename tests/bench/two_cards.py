"""One card and several of the same machine, on the user's path: tokens a second, peak of each card, losses.

    python tests/bench/two_cards.py MODEL --seq 2048 --bs 2 [--cards 2] [--dtype bf16 --r 16] [--out FILE]

Three runs of ``nbqlora.finetune`` with the same rows, each in processes of its own: one card with BS rows a step; CARDS
cards with BS rows each, under ``torchrun``; and one card with as many rows a step as all cards have, in several
micro-batches, for its losses. One JSON line for each, and one that compares them: ``speedup`` is the second's tokens a
second over the first's, ``loss_apart`` the largest relative distance of a step's loss between the last two.

``start_s`` is the time from the start of the processes to the first step's begin, ``added_ms`` what the all-reduce of
the gradients takes by itself, by the link's rate as it was measured when the cards joined. On a CPU the cards are
processes with gloo.

``tests/bench/make_model.py`` makes a MODEL.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from nbqlora.core.events import Event

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}
LONGEST_SECONDS = 900
# The first word of a command that is a part of a run.
PART = "part"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained.

    Args:
        bs: rows of a micro-batch.
        accumulation: micro-batches of a step, on each card.
        cards: that train together.
    """

    model: Path
    seq: int
    bs: int
    dtype: str
    r: int
    steps: int
    warmup: int
    cards: int = 1
    accumulation: int = 1


def of_command(arguments: list[str]) -> tuple[argparse.Namespace, Shape]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that make_model.py made")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--bs", type=int, required=True, help="rows of a card's micro-batch")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--steps", type=int, default=18, help="measured")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    given = parser.parse_args(arguments)
    names = ("model", "seq", "bs", "dtype", "r", "steps", "warmup", "cards")
    return given, Shape(**{name: getattr(given, name) for name in names})


class Watch:
    """Takes the figures from a run's events."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.tokens: list[int] = []
        self.peak_bytes, self.trains_at = 0, 0.0

    def __call__(self, event: Event) -> None:
        from nbqlora.core.events import PhaseEvent, StepEvent

        if isinstance(event, PhaseEvent) and event.phase == "train":
            self.trains_at = time.time()
        elif isinstance(event, StepEvent):
            self.seconds.append(event.seconds)
            self.losses.append(event.loss)
            self.tokens.append(event.n_tokens)
            self.peak_bytes = event.peak_bytes


def train(shape: Shape, told: Path) -> None:
    """One process's part of a run; what it saw goes to ``told`` and its rank."""
    import nbqlora
    from tests.bench.make_model import sentences
    from tests.bench.measured import card_name

    rank, watch, steps = int(os.environ.get("RANK", "0")), Watch(), shape.warmup + shape.steps
    # As many rows as the longest of the runs takes, so that all see the same ones in the same order.
    rows = [{"text": text} for text in sentences(steps * shape.bs * shape.cards * shape.accumulation, shape.seq)]
    with tempfile.TemporaryDirectory() as folder:
        run = nbqlora.finetune(
            model=str(shape.model),
            data=rows,
            output_dir=str(Path(folder) / "run"),
            observe=watch,
            max_length=shape.seq,
            max_steps=steps,
            per_device_train_batch_size=shape.bs,
            gradient_accumulation_steps=shape.accumulation,
            gradient_checkpointing="none",
            packing=False,
            padding_free=False,
            dtype=shape.dtype,
            lora_r=shape.r,
            lora_alpha=shape.r,
            trl={"train_sampling_strategy": "sequential"},
        )
    plan = run.plan
    found = {
        "seconds": watch.seconds, "losses": watch.losses, "tokens": watch.tokens, "peak_bytes": watch.peak_bytes,
        "trains_at": watch.trains_at, "planned_bytes": plan.predicted_peak_bytes, "planned_seconds": plan.step_seconds,
        "sent_bytes": plan.sent_bytes, "link": plan.device.link_bytes_per_second, "n_cards": plan.n_cards,
        "card": card_name(),
    }  # fmt: skip
    told.with_name(f"{told.name}-{rank}").write_text(json.dumps(found))


def run(shape: Shape) -> dict[str, Any]:
    """A run in processes of its own, and its line."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(shape.cards)]
        # One word, since torchrun takes what looks like its own options, also behind the script.
        given = json.dumps({**asdict(shape), "model": str(shape.model)})
        began = time.time()
        command = [sys.executable, *(starter if shape.cards > 1 else []), __file__, PART, given, str(told)]
        subprocess.run(command, check=True, timeout=LONGEST_SECONDS, stdout=sys.stderr)
        found = [json.loads(told.with_name(f"told-{rank}").read_text()) for rank in range(shape.cards)]
    return {**asdict(shape), "model": shape.model.name, **figures(shape, found, began)}


def figures(shape: Shape, found: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """Of the first card what is the same on all, and every card's peak."""
    first, measured = found[0], slice(shape.warmup, shape.warmup + shape.steps)
    expected = shape.cards * shape.bs * shape.accumulation * shape.seq
    if first["n_cards"] != shape.cards or set(first["tokens"]) != {expected}:
        raise RuntimeError(f"{first['n_cards']} cards with steps of {sorted(set(first['tokens']))} tokens")
    middle = median(first["seconds"][measured])
    return {
        "tok_s": round(expected / middle),
        "step_ms": round(1e3 * middle, 2),
        "min_ms": round(1e3 * min(first["seconds"][measured]), 2),
        "peak_gib": [round(each["peak_bytes"] / 2**30, 3) for each in found],
        "planned_gib": round(first["planned_bytes"] / 2**30, 3),
        "planned_step_ms": first["planned_seconds"] and round(1e3 * first["planned_seconds"], 1),
        "sent_mb": round(first["sent_bytes"] / 1e6, 1),
        "link_gb_s": first["link"] and round(first["link"] / 1e9, 1),
        "added_ms": first["link"] and round(1e3 * first["sent_bytes"] / first["link"], 2),
        "start_s": round(first["trains_at"] - began, 1),
        "losses": [round(loss, 6) for loss in first["losses"]],
        "card": first["card"],
    }


def compared(one: dict[str, Any], all_cards: dict[str, Any], accumulated: dict[str, Any]) -> dict[str, Any]:
    """What several cards bring, and whether they learn the same."""
    pairs = zip(all_cards["losses"], accumulated["losses"], strict=True)
    return {
        "cards": all_cards["cards"],
        "speedup": round(all_cards["tok_s"] / one["tok_s"], 3),
        "speedup_over_accumulating": round(all_cards["tok_s"] / accumulated["tok_s"], 3),
        "loss_apart": max(abs(a - b) / abs(b) for a, b in pairs),
    }


def main(arguments: list[str]) -> None:
    """All three runs; or, as one of their processes, a part of one."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if arguments[:1] == [PART]:
        settings = json.loads(arguments[1])
        train(Shape(**{**settings, "model": Path(settings["model"])}), Path(arguments[2]))
        return
    given, shape = of_command(arguments)
    from tests.bench.engine import origin, without_folders

    alone = replace(shape, cards=1)
    lines = [run(each) for each in (alone, shape, replace(alone, accumulation=shape.cards))]
    lines.append(compared(*lines))
    command = origin(without_folders(arguments, given.model, given.out), "two_cards.py")
    for line in lines:
        text = json.dumps({**line, **command})
        print(text, flush=True)
        if given.out:
            with given.out.open("a") as file:
                file.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
