"""Layers' weights split over cards, beside the same model with all weights on each card, and FSDP's own way.

    python tests/bench/sharded.py MODEL --seq 2048 --bs 1 [--layers full] [--vram-gib 78] [--runs split whole fsdp]
        [--profile] [--out FILE]

Each run is in processes of its own under ``torchrun``, one for each card. ``split`` and ``whole`` are
``nbqlora.finetune`` with the same rows, ``fsdp = true`` and ``false``; a model that one card cannot hold has no
``whole``. ``fsdp`` is what FSDP's own example does: transformers' layers with PEFT's adapters and bitsandbytes' weights
in bf16 storage, each layer under ``fully_shard`` with its hooks, gradient checkpointing.

One JSON line for each run: tokens a second, each card's peak beside the plan's, the link's rate, seconds to load and
to the first step, losses; and one that compares ``split`` with the others that ran. ``off_percent`` is the plan's peak
over the highest measured one. With ``--profile`` also of one more step on the first card the launches (copies among
them), and the milliseconds of collectives and of everything else. On a CPU the cards are processes with gloo, and
``fsdp`` has no peak: it shows that it runs.

``tests/bench/make_model.py`` makes a MODEL, a large one quickly with ``--same-layers``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import two_cards  # noqa: E402

if TYPE_CHECKING:
    from nbqlora.core.events import Event

# NVLink multicast fails on hosts that hand out only some of their cards.
ENVIRONMENT = {**two_cards.ENVIRONMENT, "NCCL_NVLS_ENABLE": "0"}
RUNS = ("split", "whole", "fsdp")
LONGEST_SECONDS = 1800
PART = "part"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What is trained, and how.

    Args:
        how: one of ``RUNS``.
        bs: rows of a card's micro-batch, one a step.
        layers: ``gradient_checkpointing``.
        vram_gib: that a card may take; None for all there is.
        steps: measured, after ``warmup`` others.
        profile: ours only: of one more step, what its kernels take.
    """

    how: str
    model: Path
    seq: int
    bs: int
    dtype: str
    r: int
    layers: str
    vram_gib: float | None
    steps: int
    warmup: int
    cards: int
    profile: bool = False


def of_command(arguments: list[str]) -> tuple[argparse.Namespace, list[Shape]]:
    """What the command line asks for, a shape a run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that make_model.py made")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--bs", type=int, default=1, help="rows of a card's micro-batch")
    parser.add_argument("--cards", type=int, default=2)
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--layers", default="auto", help="gradient_checkpointing: auto, none, full or offload")
    parser.add_argument("--vram-gib", type=float, help="that a card may take")
    parser.add_argument("--steps", type=int, default=8, help="measured")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=["split", "whole"])
    parser.add_argument("--profile", action="store_true", help="what the kernels of one more step take")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    given = parser.parse_args(arguments)
    names = ("model", "seq", "bs", "dtype", "r", "layers", "vram_gib", "steps", "warmup", "cards", "profile")
    same = {name: getattr(given, name) for name in names}
    return given, [Shape(how=how, **same) for how in given.runs]


class Watch(two_cards.Watch):
    """Also when loading began; and a profile of the step behind the first ``n_before``."""

    def __init__(self, n_before: int | None = None) -> None:
        super().__init__()
        self.loads_at = 0.0
        self.kernels: dict[str, float] = {}
        self._n_before, self._profiler = n_before, None

    def __call__(self, event: Event) -> None:
        from nbqlora.core.events import PhaseEvent, StepEvent

        super().__call__(event)
        if isinstance(event, PhaseEvent) and event.phase == "load":
            self.loads_at = time.time()
        if self._n_before is not None and isinstance(event, StepEvent):
            self._profile(event.step - self._n_before)

    def _profile(self, step: int) -> None:
        from tests.bench.measured import begin_profile, wait

        if step == 0:
            self._profiler = begin_profile()
        elif step == 1 and self._profiler is not None:
            wait()
            self._profiler.stop()
            self.kernels = times_of(self._profiler.events())


def times_of(events: Any) -> dict[str, float]:
    """Kernels of a step on the card, and milliseconds that they take: collectives, and all others."""
    import torch

    on_card = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    found = {"launches": len(on_card), "computes_ms": 0.0, "gathers_ms": 0.0}
    for event in on_card:
        found["gathers_ms" if "nccl" in event.name else "computes_ms"] += event.self_device_time_total / 1e3
    return {name: round(value, 1) for name, value in found.items()}


def train(shape: Shape) -> dict[str, Any]:
    """One process's part of a run of ours; what it saw."""
    import nbqlora
    from tests.bench.make_model import sentences
    from tests.bench.measured import card_name

    measured = shape.warmup + shape.steps
    watch, steps = Watch(measured if shape.profile else None), measured + (2 if shape.profile else 0)
    rows = [{"text": text} for text in sentences(steps * shape.bs * shape.cards, shape.seq)]
    with tempfile.TemporaryDirectory() as folder:
        run = nbqlora.finetune(
            model=str(shape.model),
            data=rows,
            output_dir=str(Path(folder) / "run"),
            observe=watch,
            max_length=shape.seq,
            max_steps=steps,
            per_device_train_batch_size=shape.bs,
            gradient_accumulation_steps=1,
            gradient_checkpointing=shape.layers,
            packing=False,
            padding_free=False,
            dtype=shape.dtype,
            lora_r=shape.r,
            lora_alpha=shape.r,
            fsdp=shape.how == "split",
            trl={"train_sampling_strategy": "sequential"},
            **({} if shape.vram_gib is None else {"vram_gib": shape.vram_gib}),
        )
    plan = run.plan
    policies = [policy.value for policy in plan.layer_policies]
    return {
        "seconds": watch.seconds, "losses": watch.losses, "tokens": watch.tokens, "peak_bytes": watch.peak_bytes,
        "load_seconds": watch.trains_at - watch.loads_at, "trains_at": watch.trains_at, "shards": plan.shards,
        "planned_bytes": plan.predicted_peak_bytes, "planned_seconds": plan.step_seconds,
        "policies": {policy: policies.count(policy) for policy in dict.fromkeys(policies)}, "card": card_name(),
        "link_bytes_per_second": plan.device.link_bytes_per_second, "kernels": watch.kernels,
    }  # fmt: skip


def run(shape: Shape) -> dict[str, Any]:
    """A run in processes of its own, and its line."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told"
        given = json.dumps({**asdict(shape), "model": str(shape.model)})
        began = time.time()
        starter = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(shape.cards)]
        command = [sys.executable, *starter, __file__, PART, given, str(told)]
        subprocess.run(command, check=True, timeout=LONGEST_SECONDS, stdout=sys.stderr)
        found = [json.loads(told.with_name(f"told-{rank}").read_text()) for rank in range(shape.cards)]
    return {**asdict(shape), "model": shape.model.name, **figures(shape, found, began)}


def figures(shape: Shape, found: list[dict[str, Any]], began: float) -> dict[str, Any]:
    """Of the first card what is the same on all, and every card's peak."""
    first = found[0]
    expected = shape.cards * shape.bs * shape.seq
    shards = 1 if shape.how == "whole" else shape.cards
    if first["shards"] != shards or set(first["tokens"]) != {expected}:
        raise RuntimeError(f"{first['shards']} shards, with steps of {sorted(set(first['tokens']))} tokens")
    middle, peaks = (
        median(first["seconds"][shape.warmup : shape.warmup + shape.steps]),
        [each["peak_bytes"] for each in found],
    )
    planned = first["planned_bytes"]
    return {
        "tok_s": round(expected / middle),
        "step_ms": round(1e3 * middle, 1),
        "planned_step_ms": first["planned_seconds"] and round(1e3 * first["planned_seconds"], 1),
        "peak_gib": [round(peak / 2**30, 3) for peak in peaks],
        "planned_gib": round(planned / 2**30, 3) if planned else None,
        "off_percent": round(100 * (planned / max(peaks) - 1), 2) if planned else None,
        # What the plan measured; FSDP's example measures none.
        "link_gb_s": round(first["link_bytes_per_second"] / 1e9, 1) if "link_bytes_per_second" in first else None,
        "load_s": round(max(each["load_seconds"] for each in found), 1),
        "start_s": round(first["trains_at"] - began, 1),
        **first.get("kernels", {}),
        "policies": first["policies"],
        "losses": [round(loss, 6) for loss in first["losses"]],
        "card": first["card"],
    }


def compared(split: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """What splitting costs and saves, and whether the same is learned."""
    # FSDP's own example takes other rows and other random adapters.
    pairs = [] if other["how"] == "fsdp" else list(zip(split["losses"], other["losses"], strict=True))
    return {
        "compared_with": other["how"],
        "speed": round(split["tok_s"] / other["tok_s"], 3),
        "peak": round(max(split["peak_gib"]) / max(other["peak_gib"]), 3) if max(other["peak_gib"]) else None,
        "loss_apart": max((abs(a - b) / abs(b) for a, b in pairs), default=None),
    }


def part(shape: Shape, told: Path) -> None:
    """One process of a run; what it saw goes to ``told`` and its rank."""
    rank = int(os.environ.get("RANK", "0"))
    if shape.how == "fsdp":
        from tests.bench.fsdp_example import train as train_example

        found = train_example(shape)
    else:
        found = train(shape)
    told.with_name(f"{told.name}-{rank}").write_text(json.dumps(found))


def main(arguments: list[str]) -> None:
    """All runs; or, as one of their processes, a part of one."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if arguments[:1] == [PART]:
        settings = json.loads(arguments[1])
        part(Shape(**{**settings, "model": Path(settings["model"])}), Path(arguments[2]))
        return
    given, shapes = of_command(arguments)
    from tests.bench.engine import origin, without_folders

    command = origin(without_folders(arguments, given.model, given.out), "sharded.py")
    lines: dict[str, dict[str, Any]] = {}
    for shape in shapes:
        lines[shape.how] = run(shape)
        _tell({**lines[shape.how], **command}, given.out)
    for how, line in lines.items():
        if how != "split" and "split" in lines:
            _tell({**compared(lines["split"], line), **command}, given.out)


def _tell(line: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with out.open("a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
