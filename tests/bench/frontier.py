"""Tokens/s over the memory allowed, on one card: one model, one load, a plan for each point.

    python tests/bench/frontier.py MODEL POINT [POINT ...] --seq 2048 --bs 2 [--dtype bf16] [--r 16] [--out FILE]

A POINT is ``VRAM`` or ``VRAM:RAM`` in GiB: what the plan may take of the card and of the host (0 where it is left out:
nothing is offloaded). A step is BS rows of SEQ tokens, all learned; the plan splits it into micro-batches, unless
``--micro-batch`` says how many rows each has.

Each point is a line: what was planned (peak, seconds, layers, micro-batches), and what was measured: peak allocated
from before the first step on, peak reserved, median seconds. ``within`` says that the peak is not above VRAM. The exit
code is 1 where a point failed or went above it; a point that no plan fits is a line that says so, and no failure.

``notebooks/302_memory_budget.ipynb`` draws the stored lines beside the planned curve and the peers' points.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import engine

if TYPE_CHECKING:
    from tests.bench.measured import Measured
    from tests.bench.replanned import Replanned


@dataclass(frozen=True, kw_only=True)
class Work:
    """A step, and how often it is taken.

    Args:
        seq, bs: tokens of a row, rows of a step.
        micro_batch: rows of a micro-batch; None for as many as the plan says.
        steps, warmup: steps that are measured, and steps before them: the first is eager, the second captures.
    """

    seq: int
    bs: int
    micro_batch: int | None = None
    dtype: str = "bf16"
    r: int = 16
    optim: str = "adamw_torch_fused"
    steps: int = 8
    warmup: int = 4


def point_of(text: str) -> tuple[float, float]:
    """``VRAM`` or ``VRAM:RAM`` -> GiB of both."""
    vram, _, ram = text.partition(":")
    try:
        return float(vram), float(ram or 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not VRAM or VRAM:RAM in GiB, as in 6.8:2") from None


def work_of(arguments: list[str]) -> tuple[Work, argparse.Namespace]:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder that make_model.py made")
    parser.add_argument("points", nargs="+", type=point_of, metavar="POINT")
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--bs", type=int, required=True)
    parser.add_argument("--micro-batch", type=int, help="rows of a micro-batch, not planned")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default=Work.dtype)
    parser.add_argument("--r", type=int, default=Work.r)
    parser.add_argument("--optim", choices=("adamw_torch_fused", "adamw_8bit"), default=Work.optim)
    parser.add_argument("--steps", type=int, default=Work.steps, help="measured")
    parser.add_argument("--warmup", type=int, default=Work.warmup, help="steps before them")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parsed = parser.parse_args(arguments)
    return Work(**{name: getattr(parsed, name) for name in Work.__dataclass_fields__}), parsed


def measure(stand: Replanned, work: Work, vram_gib: float, ram_gib: float) -> dict[str, Any]:
    """One point: its line without where it comes from.

    Raises:
        DoesNotFitError: no plan fits.
    """
    import torch

    from nbqlora.core.specs import DataStats
    from tests.bench.replanned import rows_of

    plan = stand.plan(
        DataStats.full(work.bs, work.seq),
        max_length=work.seq,
        effective_batch_size=work.bs,
        per_device_train_batch_size=work.micro_batch,
        optim=work.optim,
        vram_gib=vram_gib,
        ram_gib=ram_gib,
    )
    numbers, rows = torch.Generator().manual_seed(1), plan.micro_batch_size
    steps = [
        [rows_of(rows, work.seq, numbers) for _ in range(plan.gradient_accumulation_steps)]
        for _ in range(work.warmup + work.steps)
    ]
    found = stand.run(plan, steps, optim=work.optim)
    return line_of(work, found, vram_gib)


def line_of(work: Work, found: Measured, vram_gib: float) -> dict[str, Any]:
    """The figures of a point."""
    import torch

    plan = found.plan
    assert plan is not None
    middle, tokens = median(found.seconds[work.warmup :]), work.bs * work.seq
    on_card = torch.cuda.is_available()
    return {
        **engine.planned(plan),
        "batch": f"{plan.micro_batch_size}x{plan.gradient_accumulation_steps}",
        "planned_tok_s": round(tokens / plan.step_seconds) if plan.step_seconds else None,
        "tok_s": round(tokens / middle),
        "step_ms": round(1e3 * middle, 2),
        "first_s": round(found.seconds[0], 2),
        "base_gib": engine.gib(found.base_bytes) if on_card else None,
        "peak_gib": engine.gib(found.peak_bytes) if on_card else None,
        "reserved_gib": engine.gib(found.reserved_bytes) if on_card else None,
        "within": found.peak_bytes <= vram_gib * 2**30 if on_card else None,
        "loss": [round(found.losses[0], 4), round(found.losses[-1], 4)],
        "load_s": round(found.load_seconds, 1),
    }


def point(stand: Replanned, work: Work, vram_gib: float, ram_gib: float) -> tuple[dict[str, Any], bool]:
    """The figures of a point or why there are none, and whether that is as it should be."""
    from nbqlora.core.errors import DoesNotFitError

    try:
        figures = measure(stand, work, vram_gib, ram_gib)
    except DoesNotFitError as error:
        return {"does_not_fit": str(error).splitlines()[0].partition(" needs ")[2]}, True
    except Exception as error:  # any, so that the other points are measured
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)
        return {"error": engine.said(error)}, False
    return figures, figures["within"] is not False


def told(line: dict[str, Any]) -> str:
    """A line for the screen."""
    head = f"{line['vram_gib']:6.2f} GiB + {line['ram_gib']:4.1f} host  "
    why = line.get("error") or (f"needs {line['does_not_fit']}" if "does_not_fit" in line else "")
    if why:
        return head + why
    layers = " ".join(f"{n} {name}" for name, n in line["layers"].items())
    peak = "-" if line["peak_gib"] is None else f"{line['peak_gib']:.3f}"
    above = "" if line["within"] is not False else "  ABOVE"
    return (
        f"{head}{line['tok_s']:8,} tok/s (plan {line['planned_tok_s'] or 0:,})  peak {peak} (plan "
        f"{line['planned_gib']:.3f}){above}  {line['batch']}  {layers}"
    )


def main(arguments: list[str]) -> int:
    """Measure every point; print, write, and say whether all went as they should."""
    work, parsed = work_of(arguments)
    for name, value in engine.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from tests.bench.measured import card_name
    from tests.bench.replanned import replanned

    fine = True
    with replanned(parsed.model, dtype=work.dtype, r=work.r) as stand:
        for vram_gib, ram_gib in parsed.points:
            figures, as_it_should = point(stand, work, vram_gib, ram_gib)
            fine &= as_it_should
            head = {"model": parsed.model.name, **vars(work), "vram_gib": vram_gib, "ram_gib": ram_gib}
            command = engine.without_folders(arguments, parsed.model, parsed.out)
            line = {**head, **figures, "card": card_name(), **engine.origin(command, "frontier.py")}
            print(told(line), flush=True)
            if parsed.out:
                with parsed.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
