"""Merges that are killed with SIGKILL at random moments: what stands under the name is always whole.

A fork server, as in ``tests/run/kills.py``: this process imports everything once; each attempt is a fork of it that
merges one of two adapters into the same target, so that merges begin, go on and replace each other. Most kills come
at a random moment of the attempt's usual life, a part of them in its last milliseconds, when names are changed.

    python -m tests.hub.kill_merges --kills 1000 --seed 3
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from nbqlora.hub.merge import work_folder
from nbqlora.hub.merge_journal import MANIFEST, damage
from nbqlora.hub.sealed import sha256
from tests.hub.merging import merge_tiny, save_base, save_lora


def attempt(base: Path, adapter: Path, target: Path, die_after: float | None) -> str:
    """One merge in a fork: ``done``, ``killed`` or ``failed``."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            merge_tiny(base, [adapter], target, max_shard_size="60KB", check=False)
            status = 0
        finally:
            os._exit(status)
    if die_after is not None:
        time.sleep(die_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else "done" if os.WEXITSTATUS(status) == 0 else "failed"


def state(target: Path, wholes: dict[str, dict[str, str]]) -> str:
    """Which merge stands under the name: one of ``wholes``, or ``none``; anything else is an error."""
    if not target.exists():
        return "none"
    wrong = damage(target)
    if wrong:
        raise AssertionError(f"unreadable: {wrong}")
    files = digests(target)
    for name, whole in wholes.items():
        if files == whole:
            return name
    raise AssertionError("whole by its manifest, but of no known merge")


def digests(folder: Path) -> dict[str, str]:
    """Of all files but the manifest, which notes when nothing."""
    return {f.name: sha256(f) for f in folder.iterdir() if f.name != MANIFEST}


def run(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kill so many merges; what was found, counted."""
    numbers, found = random.Random(seed), Counter[str]()
    base = save_base(folder / "base", "llama")
    adapters = {name: save_lora(base, folder / name, seed=i) for i, name in enumerate(("one", "two"))}
    torch.set_num_threads(1)  # threads do not survive a fork
    wholes: dict[str, dict[str, str]] = {}
    for name, adapter in adapters.items():
        merge_tiny(base, [adapter], folder / f"whole-{name}", max_shard_size="60KB", check=False)
        wholes[name] = digests(folder / f"whole-{name}")
    target, usual = folder / "merged", list[float]()
    for name in ("one", "two", "one"):
        begun = time.monotonic()
        assert attempt(base, adapters[name], target, None) == "done"
        usual.append(time.monotonic() - begun)
    while found["killed"] < kills:
        before = state(target, wholes)
        name = numbers.choice([n for n in adapters if n != before])
        late, seconds = numbers.random() < 0.4, sorted(usual[-9:])[len(usual[-9:]) // 2]
        die = seconds * (numbers.uniform(0.85, 1.0) if late else numbers.uniform(0, 1.0))
        how = attempt(base, adapters[name], target, die)
        after = state(target, wholes)
        assert how != "failed"
        assert after in (before, name), f"{before} became {after} while {name} was merged"
        assert how != "done" or after == name
        found[how] += 1
        found[f"{how}: {'new' if after == name != before else 'as it was'}"] += 1
        if how == "killed" and numbers.random() < 0.5:
            kept = json.loads(text)["shards"] if (text := _journal(target)) else {}
            found["went on"] += bool(kept)
            begun = time.monotonic()
            assert attempt(base, adapters[name], target, None) == "done"
            usual += [] if kept or after == name else [time.monotonic() - begun]
            assert state(target, wholes) == name
            left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
            assert not left, left
    return found


def _journal(target: Path) -> str:
    file = work_folder(target) / MANIFEST
    return file.read_text() if file.is_file() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for what, n in sorted(run(Path(folder), asked.kills, asked.seed).items()):
            print(f"{n:6} {what}")
    print(f"{time.monotonic() - begun:.0f} s, no unreadable state")


if __name__ == "__main__":
    main()
