"""Speed and memory of the whole path (``nbqlora.finetune``) on one card, a JSON line a configuration.

    python tests/bench/main_job.py MODEL_DIR [--out FILE] CONFIG [CONFIG ...]

A CONFIG is ``key=value,key=value``: options of a cell, plus ``rows`` (rows in the data, 64). Each row is cut
at ``max_length``, so every row is as long. All run in one process, one after the other: what a run leaves
behind shows in ``left_mib``.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch

import nbqlora

WORDS = ("the", "of", "and", "to", "in", "is", "was", "for", "on", "that", "by", "with", "as", "his", "this", "from")


def options_of(text: str) -> dict[str, Any]:
    """``a=1,b=x`` -> mapping, values read as JSON where they are."""
    options: dict[str, Any] = {}
    for pair in text.split(","):
        key, _, value = pair.partition("=")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def rows_of(count: int, tokens: int) -> list[dict[str, str]]:
    """Rows of at least ``tokens`` words, seeded."""
    rng = random.Random(0)
    return [{"prompt": "say", "completion": " ".join(rng.choices(WORDS, k=tokens))} for _ in range(count)]


def measure(model: str, options: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """One run."""
    count = options.pop("rows", 64)
    options = {"max_length": 1024, "max_steps": 8, "warmup_ratio": 0, **options}
    rows = rows_of(count, options["max_length"])
    run = nbqlora.finetune(model=model, data=rows, output_dir=str(output_dir), **options)
    report, plan = run.report, run.plan
    steps = report.steps
    seconds = sorted(e.seconds for e in steps[2:])[len(steps[2:]) // 2]
    on_card = torch.cuda.is_available()
    reserved = torch.cuda.max_memory_reserved() if on_card else 0
    run.free()
    return {
        "model": Path(model).name,
        **options,
        "dtype": plan.dtype,
        "batch": f"{plan.micro_batch_size}x{plan.gradient_accumulation_steps}",
        "layers": {p: [x.value for x in plan.layer_policies].count(p) for p in ("keep", "recompute_mlp", "recompute")},
        "tok_s": round(steps[-1].n_tokens / seconds),
        "planned_tok_s": round(steps[-1].n_tokens / plan.step_seconds) if plan.step_seconds else None,
        "first_step_s": round(steps[0].seconds, 2),
        "predicted_gib": round(plan.predicted_peak_bytes / 2**30, 3),
        "measured_gib": round(report.measured_peak_bytes / 2**30, 3),
        "error_percent": round(100 * (plan.predicted_peak_bytes / report.measured_peak_bytes - 1), 1),
        "reserved_gib": round(reserved / 2**30, 3),
        "left_mib": round(torch.cuda.memory_allocated() / 2**20, 1) if on_card else None,
        "loss": [round(steps[0].loss, 3), round(steps[-1].loss, 3)],
        "card": plan.device.name,
        "versions": report.versions,
    }


def main() -> None:
    """Measure each configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--out", type=Path)
    parser.add_argument("config", nargs="+")
    parsed = parser.parse_args()
    for text in parsed.config:
        try:
            result = measure(parsed.model, options_of(text), Path("/tmp/bench-run"))
        except nbqlora.NbqloraError as error:
            result = {"config": text, "error": str(error)}
        result["command"] = "python " + " ".join(["tests/bench/main_job.py", parsed.model, text])
        line = json.dumps(result)
        print({k: v for k, v in result.items() if k not in ("versions", "command", "card")}, flush=True)
        if parsed.out:
            with parsed.out.open("a") as file:
                file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main())
