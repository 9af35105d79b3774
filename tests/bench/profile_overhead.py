"""What measuring memory by phase costs: a boundary in microseconds, and the share of a run's steps.

    python tests/bench/profile_overhead.py [MODEL] [--steps 30] [--max-length 96] [--out FILE]

MODEL is a folder or a hub id; without one a tiny llama is made, whose steps are as short as steps get. A boundary is
timed alone, 2,000 times, on the device that a run would use; the run then says how long its steps take, and its plan
how many boundaries each has. On a CPU the thread that samples is timed too: what it takes from a loop in Python.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from nbqlora.memory.profile import Profile
from tests import tiny


def boundary_seconds(kind: Any, repeats: int = 2000) -> float:
    """Median of one boundary, a tensor allocated and dropped before each as a phase would."""
    device, seconds = torch.device(kind), []
    with Profile(kind) as profile:
        for i in range(repeats):
            torch.empty(1024, device=device)
            begun = time.perf_counter()
            profile.enter("forward" if i % 2 else "backward")
            seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def sampler_share(rounds: int = 15) -> float:
    """What a running profile adds to a loop in Python that never crosses a boundary."""

    def loop() -> float:
        begun = time.perf_counter()
        sum(i * i for i in range(2_000_000))
        return time.perf_counter() - begun

    without, with_it = [], []
    for _ in range(rounds):
        without.append(loop())
        with Profile("cpu"):
            with_it.append(loop())
    return min(with_it) / min(without) - 1


def run_of(model: str, rows: list[dict[str, Any]], folder: Path, steps: int, max_length: int) -> dict[str, Any]:
    """Median step of a real run, and its boundaries."""
    import nbqlora

    run = nbqlora.finetune(
        name="overhead", model=model, data=rows, output_dir=str(folder), max_steps=steps, max_length=max_length,
        effective_batch_size=4,
    )  # fmt: skip
    seconds = statistics.median(e.seconds for e in run.report.steps[1:])
    captured = any(r.path == "step" and r.new for r in run.report.replacements)
    # Captured, a step's micro-batches are one phase; else each is a forward and a backward. Then the optimizer.
    boundaries = 2 if captured else 2 * run.plan.gradient_accumulation_steps + 1
    return {"step_ms": 1e3 * seconds, "boundaries": boundaries, "captured": captured}


def measure(model: str | None, steps: int, max_length: int) -> dict[str, Any]:
    """One line of figures."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as made:
        name = model or str(tiny.save_model(Path(made) / "tiny"))
        figures = run_of(name, tiny.make_rows(64), Path(made) / "run", steps, max_length)
    cost = boundary_seconds(kind)
    line = {"boundary_us": 1e6 * cost, **figures}
    line["share"] = figures["boundaries"] * cost * 1e3 / figures["step_ms"]
    if kind == "cpu":
        line["sampler_share"] = sampler_share()
    card = torch.cuda.get_device_name() if kind == "cuda" else "CPU"
    return {**line, "model": model or "tiny", "card": card, "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--max-length", type=int, default=96)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    line = measure(asked.model, asked.steps, asked.max_length)
    print(json.dumps(line))
    if asked.out:
        asked.out.write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
