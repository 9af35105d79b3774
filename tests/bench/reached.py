"""What is compared, what is to be reached, and what the stored results say of it.

``tests/bench/compare.py`` measures, ``notebooks/901_benchmarks.ipynb`` shows. What counts for a workload is its latest
run, the median of repeats, since figures of two runs, two cards or two releases do not belong beside each other. The
targets are those of an H100 with 80 GB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).parent / "results" / "engine_h100.jsonl"
# engine.py's arguments by the name a table has for them; the last three are the peers.
STACKS = {
    "loop": ("loop",),
    "finetune": ("finetune",),
    "finetune-packed": ("finetune", "--packing"),
    "hf": ("hf",),
    "liger": ("liger",),
    "unsloth": ("unsloth",),
}
PEERS = ("hf", "liger", "unsloth")
USERS_PATH = ("finetune", "finetune-packed")
# Of the bare loop's tokens/s, and GiB above its peak.
SHARE_OF_LOOP, GIB_ABOVE_LOOP = 0.97, 0.2
FIRST_STEP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is measured, and what is to be reached.

    Args:
        model: folder, and what make_model.py calls it.
        options: of engine.py.
        tok_s, gib: at least so many tokens/s, at most so much memory.
        times_unsloth: at least so many times Unsloth's tokens/s in the same run.
    """

    model: str
    options: str
    tok_s: int | None = None
    gib: float | None = None
    times_unsloth: float | None = None

    @property
    def has_target(self) -> bool:
        """Whether more is asked of it than a first step in time."""
        return any((self.tok_s, self.gib, self.times_unsloth))


WORKLOADS = {
    "8b-bf16-2x2048-none": Workload(model="llama-8b", options="--seq 2048 --bs 2", tok_s=17_500, gib=18.5),
    "8b-bf16-2x2048-full": Workload(model="llama-8b", options="--seq 2048 --bs 2 --policy full", tok_s=12_500, gib=7.4),
    "8b-fp16-r32-2x512-none": Workload(
        model="llama-8b", options="--seq 512 --bs 2 --dtype fp16 --r 32", tok_s=12_000, gib=9.9
    ),
    "8b-fp16-r32-2x512-full": Workload(model="llama-8b", options="--seq 512 --bs 2 --dtype fp16 --r 32 --policy full"),
    "1b-bf16-4x2048-none": Workload(model="llama-1b", options="--seq 2048 --bs 4", tok_s=95_000, gib=9.5),
    "1b-bf16-4x2048-full": Workload(model="llama-1b", options="--seq 2048 --bs 4 --policy full"),
    "1b-bf16-4x512-none": Workload(model="llama-1b", options="--seq 512 --bs 4", times_unsloth=2.5),
    "3b-bf16-2x2048-none": Workload(model="llama-3b", options="--seq 2048 --bs 2"),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A stack on a workload, medians of its repeats, the highest peak; ``error`` where none ended well.

    The second step is the one that captures.
    """

    tok_s: float = 0.0
    peak_gib: float | None = None
    first_s: float = 0.0
    second_s: float | None = None
    runs: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One target: what was asked, what was found."""

    workload: str
    asked: str
    found: str
    reached: bool


Table = Mapping[str, Mapping[str, Figures]]


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """The stored lines; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def latest(lines: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of each workload, the lines of the run that was stored last."""
    lines = list(lines)
    last = {line["workload"]: line["run"] for line in lines}
    return [line for line in lines if line["run"] == last[line["workload"]]]


def table_of(lines: Iterable[Mapping[str, Any]]) -> Table:
    """Figures by workload and stack, of the latest run."""
    chosen = latest(lines)
    table: dict[str, dict[str, Figures]] = {}
    for name in sorted({line["workload"] for line in chosen}, key=_place(WORKLOADS)):
        mine = [line for line in chosen if line["workload"] == name]
        stacks = sorted({line["stack_name"] for line in mine}, key=_place(STACKS))
        table[name] = {stack: _figures([line for line in mine if line["stack_name"] == stack]) for stack in stacks}
    return table


def _place(order: Iterable[str]) -> Any:
    places = {name: i for i, name in enumerate(order)}
    return lambda name: (places.get(name, len(places)), name)


def _figures(lines: Sequence[Mapping[str, Any]]) -> Figures:
    good = [line for line in lines if "error" not in line]
    if not good:
        return Figures(error=lines[-1]["error"])
    seconds = [line["second_s"] for line in good if line["second_s"] is not None]
    peaks = [line["peak_gib"] for line in good if line["peak_gib"] is not None]
    return Figures(
        tok_s=median(line["tok_s"] for line in good),
        peak_gib=max(peaks) if peaks else None,
        first_s=median(line["first_s"] for line in good),
        second_s=median(seconds) if seconds else None,
        runs=len(good),
    )


def best_peer(stacks: Mapping[str, Figures]) -> float | None:
    """Tokens/s of the fastest peer."""
    return max((found.tok_s for name, found in stacks.items() if name in PEERS and not found.error), default=None)


def text_of(table: Table) -> str:
    """The table."""
    titles = f"{'tokens/s':>10}{'peak GiB':>10}{'first, second step':>20}{'x best peer':>13}{'runs':>6}"
    head = f"{'workload':24}{'stack':17}{titles}"
    lines = [head]
    for name, stacks in table.items():
        peer = best_peer(stacks)
        for stack, found in stacks.items():
            if found.error:
                lines.append(f"{name:24}{stack:17}  failed: {found.error[:60]}")
                continue
            peak = "-" if found.peak_gib is None else f"{found.peak_gib:.2f}"
            times = f"{found.tok_s / peer:.2f}" if peer else "-"
            second = "-" if found.second_s is None else f"{found.second_s:.2f}"
            early = f"{found.first_s:.2f}, {second} s"
            row = f"{found.tok_s:10,.0f}{peak:>10}{early:>20}{times:>13}{found.runs:6}"
            lines.append(f"{name:24}{stack:17}{row}")
    return "\n".join(lines)


def verdicts(table: Table) -> list[Verdict]:
    """Every target of the stacks that ran, reached or not; one that failed has reached none."""
    found: list[Verdict] = []
    for name, stacks in table.items():
        loop = stacks.get("loop")
        for stack, mine in stacks.items():
            if stack in PEERS:
                continue
            if mine.error:
                found.append(Verdict(workload=name, asked=f"{stack} runs", found="failed", reached=False))
            elif stack in USERS_PATH and loop and not loop.error:
                found += _beside_loop(name, stack, mine, loop)
            elif stack == "loop" and name in WORKLOADS:
                found += _of_loop(name, mine, stacks.get("unsloth"))
    return found


def _of_loop(name: str, loop: Figures, unsloth: Figures | None) -> list[Verdict]:
    """The workload's own targets."""
    wanted, found = WORKLOADS[name], []

    def add(asked: str, value: str, reached: bool) -> None:
        found.append(Verdict(workload=name, asked=asked, found=value, reached=reached))

    if wanted.tok_s:
        add(f">= {wanted.tok_s:,} tokens/s", f"{loop.tok_s:,.0f}", loop.tok_s >= wanted.tok_s)
    if wanted.gib and loop.peak_gib is not None:
        add(f"<= {wanted.gib} GiB", f"{loop.peak_gib:.2f}", loop.peak_gib <= wanted.gib)
    if wanted.times_unsloth and unsloth and not unsloth.error:
        times = loop.tok_s / unsloth.tok_s
        add(f">= {wanted.times_unsloth} x Unsloth", f"{times:.2f}", times >= wanted.times_unsloth)
    add(f"first step < {FIRST_STEP_SECONDS:.0f} s", f"{loop.first_s:.2f}", loop.first_s < FIRST_STEP_SECONDS)
    return found


def _beside_loop(name: str, path: str, mine: Figures, loop: Figures) -> list[Verdict]:
    """The user's path against the bare loop."""
    share = mine.tok_s / loop.tok_s
    asked = f"{path} >= {SHARE_OF_LOOP:.0%} of loop"
    made = [Verdict(workload=name, asked=asked, found=f"{share:.1%}", reached=share >= SHARE_OF_LOOP)]
    if mine.peak_gib is not None and loop.peak_gib is not None:
        more = mine.peak_gib - loop.peak_gib
        asked = f"{path} <= loop + {GIB_ABOVE_LOOP} GiB"
        made.append(Verdict(workload=name, asked=asked, found=f"{more:+.2f}", reached=more <= GIB_ABOVE_LOOP))
    return made


def told(found: Sequence[Verdict]) -> str:
    """The verdicts, those that were not reached marked."""
    return "\n".join(
        f"{v.workload:24}{v.asked:34}{v.found:>10}   {'reached' if v.reached else 'NOT REACHED'}" for v in found
    )
