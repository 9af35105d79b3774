"""Exports that are killed with SIGKILL at random moments: the target is absent, the old file or the new one, whole.

This process imports everything once; each attempt is a fork of it that exports over what the one before left. After
every kill the target's digest is looked at, and at the end an export that is left alone clears everything away.

    python -m tests.hub.gguf.kills --kills 1000 --seed 3
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from nbqlora.hub.atomic import HIDDEN
from nbqlora.hub.gguf import export_gguf
from tests.hub.gguf.stream import FolderStream
from tests.hub.gguf.tiny_models import save

SIMPLE = ("F32", "Q8_0", "F16")
WITH_K = ("Q4_K_M", "F32", "Q6_K")


def make_model(folder: Path) -> Path:
    """A model that takes some hundredths of a second to export."""
    return save(folder / "model", "llama", {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512})


def run(kills: int, seed: int, model: Path, targets: Path, quantizations: tuple[str, ...] = SIMPLE) -> dict[str, Any]:
    """Kill so often; returns how many kills found what.

    Raises:
        AssertionError: a file was neither absent nor whole, or something stayed.
    """
    numbers, counts = random.Random(seed), Counter[str]()
    whole, took = {}, {}
    # The first one imports what it needs.
    export(model, targets / "whole.gguf", quantizations[0])
    for quantization in quantizations:
        begun = time.monotonic()
        whole[export(model, targets / "whole.gguf", quantization)] = quantization
        took[quantization] = time.monotonic() - begun
    (targets / "whole.gguf").unlink()
    target, before = targets / "model.gguf", ""
    while counts.total() - counts["done"] < kills:
        quantization = numbers.choice(quantizations)
        killed = attempt(model, target, quantization, numbers.uniform(0, 1.3 * took[quantization]))
        after = whole[digest(target)] if target.exists() else ""
        assert after in (before, quantization), (before, quantization, after)
        left = [f for f in targets.iterdir() if f != target]
        assert all(f.name.startswith(f"{HIDDEN}model.gguf-") for f in left), left
        assert killed or (after == quantization and not left)
        counts["done" if not killed else "while writing" if left else "replaced" if after != before else "before"] += 1
        before = after
        if numbers.random() < 0.1:
            target.unlink(missing_ok=True)
            before = ""
    assert whole[export(model, target, quantizations[0])] == quantizations[0]
    assert list(targets.iterdir()) == [target]
    return dict(sorted(counts.items()))


def export(model: Path, target: Path, quantization: str) -> str:
    return export_gguf(FolderStream(model, rows=50), target, quantization, name="model").sha256


def attempt(model: Path, target: Path, quantization: str, seconds: float) -> bool:
    """One export in a fork; whether it was killed."""
    pid = os.fork()
    if not pid:
        try:
            export(model, target, quantization)
            os._exit(0)
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, f"the export failed: {status}"
    return os.WIFSIGNALED(status)


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    for quantizations in (SIMPLE, WITH_K):
        with tempfile.TemporaryDirectory() as folder:
            model = make_model(Path(folder))
            print(json.dumps(run(asked.kills, asked.seed, model, Path(folder) / "out", quantizations)))


if __name__ == "__main__":
    main()
