"""One QLoRA engine, one workload, one process: speed and memory, as one JSON line.

    python tests/bench/engine.py STACK MODEL --seq 2048 --bs 2 [--policy full] [--dtype fp16 --r 32] [--out FILE]

STACK is

- ``loop``: ``nbqlora.load`` and ``loaded.train_step``, nothing around them;
- ``finetune``: the same workload on the user's path, ``nbqlora.finetune`` with its trainer, clipping, checkpoints and
  events: rows of exactly SEQ tokens, BS of them a step, padded (though there is nothing to pad) or ``--packing``;
- ``hf`` (transformers, PEFT, bitsandbytes), ``liger`` (the same with Liger's kernels), ``unsloth``: the peers.

All train LoRA on the seven linears of each layer. A peer has bitsandbytes' AdamW8bit, the one it is used with, unless
``--optim`` says otherwise; ``--policy full`` is its own checkpointing. ``--policy auto`` (ours alone) is the plan's mix
within ``--vram-gib`` and ``--ram-gib``; ``--ballast-gib`` leaves so much of the card free, as a smaller one has.

``tok_s`` is the tokens of a step over the median of the measured steps, each timed between two waits for the card
(``finetune``: what its step events say, the time from one step's end to the next). ``peak_gib`` is what was allocated
at most since before the first step, so that a graph's capture is counted.

``tests/bench/compare.py`` runs several, ``tests/bench/make_model.py`` makes a MODEL.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import mean, median
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    from nbqlora.core.plan import Plan
    from tests.bench.measured import Measured

OURS, PEERS = ("loop", "finetune"), ("hf", "liger", "unsloth")
LIBRARIES = ("torch", "triton", "transformers", "trl", "peft", "bitsandbytes", "liger-kernel", "unsloth")
# Before torch is imported: an allocator that does not fragment, as Unsloth sets it for itself, for all alike.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured.

    Args:
        seq, bs: tokens of a row, rows of a step.
        policy: ``none`` keeps what the backward needs, ``full`` recomputes each layer, ``auto`` is the plan's.
        vram_gib, ram_gib: what the plan may take; None for what there is.
        ballast_gib: what is left free of the card, the rest is held by another process.
        capability: kernels are chosen as for such a card, as ``(7, 5)``; they still run on this one.
        steps, warmup: steps that are measured, and steps before them.
        packing: rows as packs; ``finetune`` only.
        profile: one more step, with the card's kernels listed.
        turns, of: a folder that this process shares with others, to step in turns, and how many they are.
    """

    stack: str
    model: Path
    seq: int
    bs: int
    policy: str = "none"
    vram_gib: float | None = None
    ram_gib: float | None = None
    ballast_gib: float | None = None
    dtype: str = "bf16"
    r: int = 16
    optim: str = "adamw_torch_fused"
    steps: int = 8
    warmup: int = 6
    packing: bool = False
    profile: bool = False
    capability: tuple[int, int] | None = None
    turns: Path | None = None
    of: int = 1


def workload_of(arguments: list[str]) -> tuple[Workload, Path | None]:
    """What the command line asks for, and where the line goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stack", choices=(*OURS, *PEERS))
    parser.add_argument("model", type=Path, help="a folder that make_model.py made")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--bs", type=int, required=True)
    parser.add_argument("--policy", choices=("none", "full", "offload", "auto"), default="none")
    parser.add_argument("--vram-gib", type=float, help="what a plan may take of the card")
    parser.add_argument("--ram-gib", type=float, help="what a plan may take of the host")
    parser.add_argument("--ballast-gib", type=float, help="leave only so much of the card free")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--optim", choices=("adamw_torch_fused", "adamw_8bit"))
    parser.add_argument("--steps", type=int, help="measured (8; finetune 18)")
    parser.add_argument("--warmup", type=int, default=6, help="steps before them")
    parser.add_argument("--packing", action="store_true", help="finetune: rows as packs")
    parser.add_argument("--profile", action="store_true", help="list the kernels of one more step")
    parser.add_argument("--capability", type=capability_of, help="choose kernels as for a card of this one, as 7.5")
    parser.add_argument("--turns", type=Path, help="a folder shared with other runs: load together, step in turns")
    parser.add_argument("--of", type=int, default=1, help="how many share it")
    parser.add_argument("--out", type=Path, help="append the line to this file")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    given["optim"] = given["optim"] or ("adamw_8bit" if given["stack"] in PEERS else "adamw_torch_fused")
    given["steps"] = given["steps"] or (18 if given["stack"] == "finetune" else 8)
    if given["packing"] and given["stack"] != "finetune":
        parser.error("--packing is for finetune")
    if given["stack"] in PEERS and (given["policy"] not in ("none", "full") or given["vram_gib"] or given["ram_gib"]):
        parser.error("a plan is ours alone")
    return Workload(**given), out


def capability_of(text: str) -> tuple[int, int]:
    """``7.5`` -> ``(7, 5)``."""
    major, _, minor = text.partition(".")
    return int(major), int(minor)


def choose_kernels_as(capability: tuple[int, int]) -> None:
    """Let nbqlora see another card; Triton still compiles for this one."""
    import torch

    if torch.cuda.is_available():
        from triton.runtime import driver

        driver.active.get_current_target()  # keeps the function that it asks torch with
    torch.cuda.get_device_capability = lambda device=None: capability


def line_of(workload: Workload, found: Measured) -> dict[str, Any]:
    """The figures of a run."""
    import torch

    from tests.bench.measured import card_name

    steps = found.seconds[workload.warmup : workload.warmup + workload.steps]
    on_card = torch.cuda.is_available()
    tokens, middle = workload.bs * workload.seq, median(steps)
    return {
        **head_of(workload),
        "tok_s": round(tokens / middle),
        "step_ms": round(1e3 * middle, 2),
        "min_ms": round(1e3 * min(steps), 2),
        "mean_ms": round(1e3 * mean(steps), 2),
        "base_gib": gib(found.base_bytes) if on_card else None,
        "peak_gib": gib(found.peak_bytes) if on_card else None,
        "reserved_gib": gib(torch.cuda.max_memory_reserved()) if on_card else None,
        "load_s": round(found.load_seconds, 1),
        "first_s": round(found.seconds[0], 2),
        "second_s": round(found.seconds[1], 2) if len(found.seconds) > 1 else None,
        "loss": [round(found.losses[0], 4), round(found.losses[-1], 4)],
        **({} if found.plan is None else planned(found.plan)),
        **({"launches": found.launches, "busy_ms": round(found.busy_ms, 1)} if workload.profile else {}),
        "card": card_name(),
    }


def planned(plan: Plan) -> dict[str, Any]:
    """What the plan said."""
    layers = Counter(policy.value for policy in plan.layer_policies)
    return {
        "planned_gib": gib(plan.predicted_peak_bytes),
        "planned_step_ms": None if plan.step_seconds is None else round(1e3 * plan.step_seconds, 1),
        "layers": dict(layers),
        "mlp_tile_tokens": plan.mlp_tile_tokens,
        "host_gib": gib(plan.host_bytes),
        "loss_chunk_tokens": plan.loss_chunk_tokens,
    }


def head_of(workload: Workload) -> dict[str, Any]:
    """What a line begins with, whether the run ended well or not."""
    head = {**asdict(workload), "model": workload.model.name}
    for name in ("profile", "turns", "of"):
        del head[name]
    return head


def gib(n_bytes: int) -> float:
    """To a MiB."""
    return round(n_bytes / 2**30, 3)


def said(error: Exception) -> str:
    """An error in a line of at most 200 characters."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0][:200]


def without_folders(arguments: list[str], *paths: Path | None) -> list[str]:
    """The same with names in place of paths, which say nothing on another machine."""
    names = {str(path): f"FOLDER/{path.name}" for path in paths if path is not None}
    return [names.get(text, text) for text in arguments]


def origin(arguments: list[str], script: str = "engine.py") -> dict[str, Any]:
    """Where a line comes from."""
    installed = {}
    for name in LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": installed,
        "command": " ".join(["python", f"tests/bench/{script}", *arguments]),
        "date": datetime.now(UTC).date().isoformat(),
    }


def main(arguments: list[str]) -> int:
    """Measure; print the line, write it, and say whether it has figures."""
    workload, out = workload_of(arguments)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        if workload.stack == "unsloth":
            import unsloth  # noqa: F401  (wants to be the first to import torch)
        from tests.bench.ballast import ballast
        from tests.bench.stacks import measure

        if workload.capability is not None:
            choose_kernels_as(workload.capability)
        with ballast(workload.ballast_gib or 0.0):
            line = line_of(workload, measure(workload))
    except Exception as error:  # a peer's may be any
        traceback.print_exc()
        if workload.turns is not None:
            (workload.turns / f"failed-{os.getpid()}").touch()
        line = {**head_of(workload), "error": said(error)}
    line |= origin(arguments)
    text = json.dumps(line)
    print(text, flush=True)
    if out:
        with out.open("a") as file:
            file.write(text + "\n")
    return 1 if "error" in line else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
