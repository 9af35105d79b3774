"""The plan's peak against the card's, over sizes, dtypes, layer policies, layouts and batches.

    python tests/bench/planned_peaks.py --models FOLDER [--shapes llama-1b llama-3b llama-8b] [--out FILE]

FOLDER holds what make_model.py made. Each size is loaded once for bf16 with rank 16, and once for fp16 with rank 32;
each configuration of ``CASES`` is then planned and run on it: a full micro-batch eagerly, captured and replayed, and
where rows differ in length also the smaller shapes that a run captures beside it. What counts is
``max_memory_allocated`` from before the first step on, with the optimizer's states.

A plan may say up to 3 % too much, and at most 1 % too little. The exit code is 1 where one is off or failed, and 2
where there is no card: nothing was checked then.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import engine

if TYPE_CHECKING:
    import torch

    from nbqlora.core.plan import Plan
    from nbqlora.core.specs import DataStats
    from tests.bench.replanned import Batch, Replanned

# Percent that a plan may be too high, and too low.
TOO_HIGH, TOO_LOW = 3.0, 1.0
RANKS = {"bf16": 16, "fp16": 32, "fp32": 16}
EACH = ("offload", "recompute", "recompute_mlp", "keep")
# Documents of a pack as shares of it: the plan is told of as many.
PACKED = (0.5, 0.25, 0.125, 0.125)
# Shapes beside the largest one that a run captures, in eighths of it.
SMALLER = (7, 6, 5, 4, 3)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration.

    Args:
        layout: ``padded`` (full rows), ``joined`` (rows end to end, of any length) or ``packed``.
        rows, tokens: of a micro-batch, and of a row or pack.
        layers: ``gradient_checkpointing``; numbers of a table are shares of the model's layers.
        tiles: planned again within a little less than the layers need, so that MLPs run in tiles.
    """

    layout: str
    rows: int
    tokens: int
    layers: str | Mapping[str, float]
    optim: str = "adamw_torch_fused"
    tiles: bool = False

    def __str__(self) -> str:
        layers = self.layers if isinstance(self.layers, str) else "+".join(self.layers)
        more = (" tiles" if self.tiles else "") + (" 8bit" if self.optim == "adamw_8bit" else "")
        return f"{layers} {self.layout} {self.rows}x{self.tokens}{more}"


CASES = {
    "bf16": (
        Case(layout="padded", rows=2, tokens=2048, layers="none"),
        Case(layout="padded", rows=4, tokens=1024, layers="full"),
        Case(layout="packed", rows=2, tokens=1024, layers={"recompute_mlp": 1.0}),
        Case(layout="padded", rows=1, tokens=4096, layers="offload"),
        Case(layout="packed", rows=1, tokens=2048, layers=dict.fromkeys(EACH, 0.25)),
        Case(layout="padded", rows=2, tokens=4096, layers="full", tiles=True),
    ),
    "fp16": (
        Case(layout="packed", rows=1, tokens=1024, layers="none"),
        Case(layout="packed", rows=8, tokens=512, layers="full"),
        Case(layout="padded", rows=1, tokens=8192, layers={"recompute": 0.125, "join": 0.875}),
        Case(layout="joined", rows=4, tokens=512, layers={"recompute_mlp": 0.5, "keep": 0.5}, optim="adamw_8bit"),
        Case(layout="padded", rows=8, tokens=512, layers={"recompute": 0.5, "keep": 0.5}),
    ),
}


def data_of(case: Case) -> DataStats:
    """What the plan is told of the rows."""
    from nbqlora.core.specs import BatchLayout, DataStats

    if case.layout == "padded":
        return DataStats.full(case.rows, case.tokens)
    lengths = sorted(int(share * case.tokens) for share in PACKED) if case.layout == "packed" else [case.tokens]
    n_tokens = case.rows * case.tokens
    return DataStats(
        n_rows=case.rows * len(lengths),
        n_sequences=case.rows,
        n_tokens=n_tokens,
        n_supervised_tokens=n_tokens,
        max_tokens=lengths[-1],
        percentiles=(lengths[0] // 2, *lengths[-1:] * 4),  # rows differ in length
        layout=BatchLayout(case.layout),
    )


def steps_of(case: Case, numbers: torch.Generator) -> list[list[Batch]]:
    """One micro-batch a step: eager, captured, replayed; then the smaller shapes, and the largest again."""
    from tests.bench.replanned import documents_of, rows_of

    if case.layout == "padded":
        return [[rows_of(case.rows, case.tokens, numbers)] for _ in range(3)]
    shares = PACKED if case.layout == "packed" else (1.0,)
    lengths = [int(share * case.tokens) for share in shares] * case.rows
    whole = sum(lengths)
    shapes = [whole, whole, *(whole * eighths // 8 for eighths in SMALLER for _ in range(2)), whole]
    return [[documents_of(cut(lengths, tokens), numbers)] for tokens in shapes]


def cut(lengths: list[int], tokens: int) -> list[int]:
    """The first documents, ``tokens`` in all."""
    found: list[int] = []
    for length in lengths:
        if sum(found) < tokens:
            found.append(min(length, tokens - sum(found)))
    return found


def layers_of(layers: str | Mapping[str, float], n_layers: int) -> Any:
    """``gradient_checkpointing``: shares as numbers of layers, the last of them the rest; at least one each."""
    if isinstance(layers, str):
        return layers
    counts = {name: max(1, int(share * n_layers)) for name, share in layers.items()}
    last = list(counts)[-1]
    counts[last] += n_layers - sum(counts.values())
    return counts


def plan_of(stand: Replanned, case: Case) -> Plan:
    """Its plan. Raises DoesNotFitError where tiles do not save a twentieth of what varies."""
    from nbqlora.core.specs import MemoryCategory

    data = data_of(case)
    options: dict[str, Any] = {
        "max_length": case.tokens,
        "per_device_train_batch_size": case.rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": layers_of(case.layers, stand.loaded.spec.n_layers),
        "optim": case.optim,
    }
    plan = stand.plan(data, **options)
    if not case.tiles:
        return plan
    varies = plan.budget.by_category[MemoryCategory.ACTIVATIONS]
    return stand.plan(data, **options, vram_gib=(plan.predicted_peak_bytes - varies / 20) / 2**30)


def measure(stand: Replanned, case: Case) -> dict[str, Any]:
    """The figures of a configuration; ``error_percent`` is None without a card."""
    import torch

    plan = plan_of(stand, case)
    found = stand.run(plan, steps_of(case, torch.Generator().manual_seed(1)), optim=case.optim)
    error = 100 * (plan.predicted_peak_bytes / found.peak_bytes - 1) if found.peak_bytes else None
    return {
        **engine.planned(plan),
        "base_gib": engine.gib(found.base_bytes) if found.peak_bytes else None,
        "peak_gib": engine.gib(found.peak_bytes) if found.peak_bytes else None,
        "reserved_gib": engine.gib(found.reserved_bytes) if found.peak_bytes else None,
        "error_percent": None if error is None else round(error, 2),
        "right": None if error is None else -TOO_LOW <= error <= TOO_HIGH,
        "budget": {category.value: n for category, n in plan.budget.by_category.items()},
        "loss": [round(found.losses[0], 4), round(found.losses[-1], 4)],
    }


def checked(stand: Replanned, case: Case) -> dict[str, Any]:
    """The figures, or the error that came in their place."""
    try:
        return measure(stand, case)
    except Exception as error:  # any, so that the other configurations are checked
        traceback.print_exc()
        traceback.clear_frames(error.__traceback__)
        return {"error": engine.said(error), "right": False}


def told(line: Mapping[str, Any]) -> str:
    """A line of the table."""
    head = f"{line['model']:11}{line['dtype']:6}{line['case']:58}"
    if "error" in line:
        return f"{head}FAILED {line['error']}"
    if line["right"] is None:
        return f"{head}{line['planned_gib']:8.3f}   not checked: no card"
    peaks = f"{line['planned_gib']:8.3f}{line['peak_gib']:8.3f}{line['error_percent']:+8.2f} %"
    return f"{head}{peaks}{'' if line['right'] else '   OFF'}"


def arguments_of(arguments: list[str]) -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--shapes", nargs="+", default=["llama-1b", "llama-3b", "llama-8b"])
    parser.add_argument("--dtypes", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--divide", type=int, default=1, help="rows shorter by this, to try the script on a CPU")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    return parser.parse_args(arguments)


def lines_of(parsed: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every configuration's line, one load for each size and dtype."""
    from tests.bench.measured import card_name
    from tests.bench.replanned import replanned

    for shape, dtype in itertools.product(parsed.shapes, parsed.dtypes):
        with replanned(parsed.models / shape, dtype=dtype, r=RANKS[dtype]) as stand:
            for whole in CASES[dtype]:
                case = replace(whole, tokens=whole.tokens // parsed.divide)
                head = {"model": shape, "dtype": dtype, "r": RANKS[dtype], "case": str(case), **asdict(case)}
                yield {**head, **checked(stand, case), "card": card_name()}


def main(arguments: list[str]) -> int:
    """Check every configuration; print, write, and say whether all were right."""
    parsed = arguments_of(arguments)
    for name, value in engine.ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    origin = engine.origin(engine.without_folders(arguments, parsed.models, parsed.out), "planned_peaks.py")
    lines = []
    for line in lines_of(parsed):
        lines.append(line)
        print(told(line), flush=True)
        if parsed.out:
            with parsed.out.open("a") as file:
                file.write(json.dumps(line | origin) + "\n")
    return verdict(lines)


def verdict(lines: Sequence[Mapping[str, Any]]) -> int:
    """The exit code, said."""
    right = [line["right"] for line in lines]
    unchecked, said = right.count(None), f"within -{TOO_LOW} and +{TOO_HIGH} %"
    print(f"{right.count(True)} of {len(right)} peaks planned {said}, {unchecked} unchecked")
    return 1 if False in right else 2 if unchecked else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
