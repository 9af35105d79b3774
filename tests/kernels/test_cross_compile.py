"""Every kernel compiles for a T4, an A100 and an H100, on a machine without any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Shared memory that a program may have, by capability; 9.0 has more than any kernel here should want.
SHARED_BYTES = {75: 64 * 1024, 80: 160 * 1024, 90: 160 * 1024}


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """A process for each capability, all at work at once: they take a minute and a half of one core."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    started = {}
    for capability in SHARED_BYTES:
        started[capability] = subprocess.Popen(
            [sys.executable, "-m", "tests.kernels.compile_all", str(capability)],
            cwd=Path(__file__).parents[2],
            env={**environment, "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp(f"sm_{capability}"))},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_all_kernels(compilers: dict[int, subprocess.Popen[str]], capability: int) -> None:
    said, complained = compilers[capability].communicate(timeout=600)
    assert compilers[capability].returncode == 0, f"after {said.splitlines()[-1:]}:\n{complained[-4000:]}"
    *cases, last = [json.loads(line) for line in said.splitlines()]
    # No tensor cores: what asks for them is a product, and Triton has none for a T4.
    assert [c["case"] for c in cases if c["mma"]] == []
    assert [c["case"] for c in cases if c["shared"] > SHARED_BYTES[capability]] == []
    assert [c["case"] for c in cases if not c["cubin_bytes"]] == []
    assert len({c["case"] for c in cases}) == len(cases)
    # Not once more for each number of tokens that a batch has.
    for name, rows in (("_rms_norm_fwd", "n_rows"), ("_rms_norm_bwd", "n_rows"), ("_low_rank_add_fwd", "tokens")):
        assert {tuple(c["any_value"]) for c in cases if c["kernel"] == f"{name}_kernel"} == {(rows,)}
    assert last["kernels"] and {c["kernel"] for c in cases} == set(last["kernels"])
    halves = {c["kernel"] for c in cases if c["case"].endswith("fp16" if capability < 80 else "bf16")}
    assert halves == set(last["kernels"])
