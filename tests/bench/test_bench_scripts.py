"""The benchmark scripts on a CPU with a tiny model: that each engine runs, fails and is judged as it should be."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.bench import compare, engine, reached
from tests.quick import quick_runs

SIZE = ["--seq", "32", "--bs", "2", "--dtype", "fp32", "--steps", "3", "--warmup", "2", "--optim", "adamw_torch_fused"]
FIELDS = {
    "stack", "model", "seq", "bs", "policy", "dtype", "r", "optim", "tok_s", "step_ms", "min_ms", "base_gib",
    "peak_gib", "reserved_gib", "load_s", "first_s", "loss", "card", "versions", "command", "date",
}  # fmt: skip
# Ends as told by the stack's name, and writes its arguments down.
FAKE_ENGINE = """
import json, sys, time
from pathlib import Path
stack, out = sys.argv[1], Path(sys.argv[sys.argv.index("--out") + 1])
if stack == "hf":
    sys.exit("no such kernel")
if stack == "unsloth":
    time.sleep(60)
out.write_text(json.dumps({"stack": stack, "tok_s": 1000, "peak_gib": 2.0, "arguments": sys.argv[1:]}))
"""

FAKE_TURNS = f"""
import json, os, pathlib, sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from tests.bench.turns import my_turn
stack, folder = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--turns") + 1])
if stack == "hf":
    (folder / f"failed-{{os.getpid()}}").touch()
    sys.exit("no such kernel")
my_turn(folder, int(sys.argv[sys.argv.index("--of") + 1]))
began = time.time()
time.sleep(0.3)
line = {{"tok_s": 1, "peak_gib": None, "from": began, "to": time.time()}}
pathlib.Path(sys.argv[sys.argv.index("--out") + 1]).write_text(json.dumps(line))
"""


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.bench.make_model import make_model

    folder = tmp_path_factory.mktemp("models") / "llama-tiny"
    make_model("llama-tiny", folder)
    return folder


def run(stack: str, model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(engine, "ENVIRONMENT", {})  # a process's own
    code = engine.main([stack, str(model), *SIZE, *more, "--out", str(out)])
    return code, json.loads(out.read_text().splitlines()[-1])


def test_engines_take_the_same_steps(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "lines"
    lines = {}
    for name, (stack, *more) in {
        "loop": ("loop",),
        "hf": ("hf", "--policy", "full", "--profile"),
        "finetune": ("finetune", "--profile"),
        "packed": ("finetune", "--packing", "--profile"),
    }.items():
        code, lines[name] = run(stack, model, out, monkeypatch, *more)
        assert code == 0
        assert set(lines[name]) >= FIELDS
        assert lines[name]["tok_s"] == pytest.approx(64e3 / lines[name]["step_ms"], rel=0.02)
        assert all(map(math.isfinite, lines[name]["loss"]))
    assert len(out.read_text().splitlines()) == 4
    assert lines["loop"]["loss"] == pytest.approx(lines["hf"]["loss"], rel=1e-3)
    assert lines["packed"]["loss"] == pytest.approx(lines["finetune"]["loss"], rel=1e-3)
    assert "--packing" in lines["packed"]["command"] and lines["packed"]["packing"]


def test_a_run_that_fails_is_a_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, line = run("loop", tmp_path / "nothing-here", tmp_path / "lines", monkeypatch)
    assert code == 1
    assert line["error"].startswith("ModelError: ") and line["model"] == "nothing-here" and "tok_s" not in line


def test_compare_goes_on_after_failures_and_turns_the_order_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_ENGINE)
    (tmp_path / "llama-1b").mkdir()
    parsed = argparse.Namespace(
        workloads=["1b-bf16-4x512-none"], models=tmp_path, stacks=["loop", "hf", "finetune-packed"], repeats=2,
        timeout=60, out=tmp_path / "results" / "lines.jsonl", run="first",
    )  # fmt: skip
    compare.compare(parsed, script)
    lines = reached.read(parsed.out)
    assert [line["stack_name"] for line in lines] == [
        "loop", "hf", "finetune-packed", "finetune-packed", "hf", "loop",
    ]  # fmt: skip
    assert lines[1]["error"] == "exit code 1: no such kernel"
    assert lines[2]["arguments"][:6] == ["finetune", str(tmp_path / "llama-1b"), "--packing", "--seq", "512", "--bs"]
    assert compare.run_one(script, ["unsloth"], 0.5) == {"error": "took longer than 0 s"}


def line(stack: str, tok_s: int, peak: float, run: str = "b", name: str = "8b-bf16-2x2048-none") -> dict[str, Any]:
    seconds = {"first_s": 1.0, "second_s": 0.4}
    return {"workload": name, "stack_name": stack, "run": run, "tok_s": tok_s, "peak_gib": peak, **seconds}


def test_results_are_judged_by_the_latest_run() -> None:
    failed = {"workload": "8b-bf16-2x2048-none", "stack_name": "liger", "run": "b", "error": "OutOfMemoryError: full"}
    lines = [
        line("loop", 99_000, 1.0, run="a"), line("loop", 17_000, 18.0), line("loop", 18_000, 18.2),
        line("loop", 18_400, 18.1), line("unsloth", 14_000, 20.8), line("finetune", 17_000, 18.5), failed,
        line("loop", 60_000, 3.0, name="1b-bf16-4x512-none"), line("unsloth", 20_000, 3.0, name="1b-bf16-4x512-none"),
    ]  # fmt: skip
    table = reached.table_of(lines)
    stacks = table["8b-bf16-2x2048-none"]
    assert list(stacks) == ["loop", "finetune", "liger", "unsloth"]
    assert (stacks["loop"].tok_s, stacks["loop"].peak_gib, stacks["loop"].runs) == (18_000, 18.2, 3)
    assert reached.best_peer(stacks) == 14_000
    found = {(v.workload[:2], v.asked): (v.found, v.reached) for v in reached.verdicts(table)}
    assert found == {
        ("8b", ">= 17,500 tokens/s"): ("18,000", True),
        ("8b", "<= 18.5 GiB"): ("18.20", True),
        ("8b", "first step < 3 s"): ("1.00", True),
        ("8b", "finetune >= 97% of loop"): ("94.4%", False),
        ("8b", "finetune <= loop + 0.2 GiB"): ("+0.30", False),
        ("1b", ">= 2.5 x Unsloth"): ("3.00", True),
        ("1b", "first step < 3 s"): ("1.00", True),
    }
    text = reached.text_of(table)
    assert "failed: OutOfMemoryError: full" in text and "1.29" in text
    assert reached.told(reached.verdicts(table)).count("NOT REACHED") == 2
    after = reached.table_of([*lines, {**failed, "stack_name": "loop", "run": "c"}])
    assert [(v.asked, v.reached) for v in reached.verdicts(after) if v.workload[:2] == "8b"] == [("loop runs", False)]


def test_no_results_are_no_error(tmp_path: Path) -> None:
    table = reached.table_of(reached.read(tmp_path / "none.jsonl"))
    assert table == {} and reached.verdicts(table) == []


def test_runs_that_share_the_card_step_one_after_the_other(tmp_path: Path) -> None:
    script = tmp_path / "fake.py"
    script.write_text(FAKE_TURNS)
    parsed = argparse.Namespace(
        workloads=["1b-bf16-4x512-none"], models=tmp_path, stacks=["loop", "hf", "finetune"],
        timeout=60, out=tmp_path / "lines.jsonl", run="first",
    )  # fmt: skip
    compare.together(parsed, script)
    lines = {line["stack_name"]: line for line in reached.read(parsed.out)}
    assert lines["hf"]["error"] == "exit code 1: no such kernel"
    (a, b), (c, d) = sorted((lines[s]["from"], lines[s]["to"]) for s in ("loop", "finetune"))
    assert a < b <= c < d, "two stepped at once"
