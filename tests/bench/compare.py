"""Engines beside each other on one card: each workload on each stack, in turns, and what was reached.

    python tests/bench/compare.py WORKLOAD [...] --models FOLDER [--stacks loop finetune unsloth] [--repeats 2]
    python tests/bench/compare.py --show

A run is a process of ``tests/bench/engine.py``; one that fails is a line with its error. The order is turned round at
each repeat, so that no stack always has the card when it is coolest. Lines are appended to
``tests/bench/results/engine_h100.jsonl``, marked with the workload, the stack and the ``run`` that they belong to: this
call, or ``--run LABEL`` where one call would be too long. tests/bench/make_model.py makes what FOLDER lacks.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.reached import RESULTS, STACKS, WORKLOADS, read, table_of, text_of, told, verdicts

ENGINE, MAKE_MODEL = (Path(__file__).with_name(name) for name in ("engine.py", "make_model.py"))


def run_one(engine: Path, arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """The line of one process, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        line = Path(folder) / "line"
        command = [sys.executable, str(engine), *arguments, "--out", str(line)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired:
            return {"error": f"took longer than {seconds:.0f} s"}
        if done.returncode:
            print(done.stderr[-2000:], file=sys.stderr)
        if line.exists():
            found: dict[str, Any] = json.loads(line.read_text())
            return {**found, "command": " ".join(["python", "tests/bench/engine.py", *arguments])}
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        return {"error": f"exit code {done.returncode}: {said[:160]}"}


def together(parsed: argparse.Namespace, engine: Path = ENGINE) -> None:
    """All stacks of all workloads at once: they load beside each other, and step one at a time."""
    asked = [(name, stack) for name in parsed.workloads for stack in parsed.stacks]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(asked)) as pool:
        turns = ["--turns", folder, "--of", str(len(asked))]

        def one(pair: tuple[str, str]) -> None:
            workload, (first, *rest) = WORKLOADS[pair[0]], STACKS[pair[1]]
            model = str(parsed.models / workload.model)
            found = run_one(engine, [first, model, *rest, *workload.options.split(), *turns], parsed.timeout)
            store(parsed, *pair, {**found, "command": str(found.get("command", "")).replace(folder, "FOLDER")})

        list(pool.map(one, asked))


def store(parsed: argparse.Namespace, name: str, stack: str, found: dict[str, Any]) -> None:
    """Append a line, and say it."""
    line = {"workload": name, "stack_name": stack, "run": parsed.run, **found}
    parsed.out.parent.mkdir(parents=True, exist_ok=True)
    with parsed.out.open("a") as file:
        file.write(json.dumps(line) + "\n")
    figures = found.get("error") or f"{found['tok_s']:,} tokens/s at {found['peak_gib']} GiB"
    print(f"{name} {stack}: {figures}", flush=True)


def compare(parsed: argparse.Namespace, engine: Path = ENGINE) -> None:
    """Run what was asked for, and store each line as soon as it is there."""
    for name in parsed.workloads:
        workload = WORKLOADS[name]
        model = parsed.models / workload.model
        for repeat in range(parsed.repeats):
            for stack in parsed.stacks if repeat % 2 == 0 else parsed.stacks[::-1]:
                first, *rest = STACKS[stack]
                found = run_one(engine, [first, str(model), *rest, *workload.options.split()], parsed.timeout)
                store(parsed, name, stack, found)


def main(arguments: Sequence[str]) -> None:
    """Compare, then show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=240, help="seconds a run may take")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--run", default=datetime.now(UTC).strftime("%Y-%m-%d %H:%M"))
    parser.add_argument("--together", action="store_true", help="load all at once, step in turns; one repeat")
    parser.add_argument("--show", action="store_true", help="only show what is stored")
    parsed = parser.parse_args(arguments)
    unknown = [name for name in parsed.workloads if name not in WORKLOADS]
    if unknown or not (parsed.workloads or parsed.show):
        parser.error(f"name workloads: {', '.join(WORKLOADS)}")
    if not parsed.show:
        for shape in {WORKLOADS[name].model for name in parsed.workloads}:
            if not (parsed.models / shape).exists():
                subprocess.run([sys.executable, str(MAKE_MODEL), shape, str(parsed.models / shape)], check=True)
        together(parsed) if parsed.together else compare(parsed)
    table = table_of(read(parsed.out))
    print(f"{text_of(table)}\n\n{told(verdicts(table))}" if table else "no results stored yet")


if __name__ == "__main__":
    main(sys.argv[1:])
