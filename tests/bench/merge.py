"""Merging a model of a real shape: seconds, bandwidth beside the disk's own, and the RAM that it takes.

    python tests/bench/merge.py llama-8b FOLDER [--base nf4] [--maximum-memory-usage 0.001] [--no-check]
        [--ballast-gib 2] [--out FILE]

The base is written with random weights in bf16 (kept in FOLDER for the next call), the adapter with rank 16 on all
linears. The merge runs in a process of its own; its RAM is the peak of ``VmHWM`` over what it was once everything was
imported. The disk's bandwidth is that of a plain write of 4 GB with fsync, just before. On a card, its memory is what
torch allocated at most; ``--ballast-gib`` leaves so much of the card free, the rest is held by another process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from nbqlora.hub.atomic import write_json
from nbqlora.hub.shards import Entry, index_of, plan_shards, write_shard
from tests.bench.ballast import ballast
from tests.bench.make_model import SHAPES, save_tokenizer

LORA_RANK = 16
MERGE = """
import json, sys, time
import torch, transformers, peft, bitsandbytes
import nbqlora, nbqlora.api
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.sources import MergeSource
from pathlib import Path

def peak():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status["VmHWM"].split()[0]) * 1024

base, adapter, target, settings = json.loads(sys.argv[1])
check = settings.pop("check")
begun, before = time.time(), peak()
source = MergeSource(folder=Path(base), adapters=(Path(adapter),), dtype="bf16")
report = merge(source, Path(target), MergeSettings(check=False, **settings))
seconds, grown = time.time() - begun, peak() - before
told = {"merge_seconds": seconds, "merge_ram_bytes": grown, **report.as_dict()}
if torch.cuda.is_available():
    told |= {"card": torch.cuda.get_device_name(), "vram_bytes": torch.cuda.max_memory_allocated()}
if check:  # the same merge again: nothing is written, and the check runs
    begun = time.time()
    report = merge(source, Path(target), MergeSettings(**settings))
    told |= {"check_seconds": time.time() - begun, "ram_bytes": peak() - before, "check": report.as_dict()["check"]}
print(json.dumps(told))
"""


def make_base(shape: str, folder: Path) -> int:
    """Write a base with random weights; returns its bytes. ``llama-8b:2`` has two layers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name, _, layers = shape.partition(":")
    changes = {"num_hidden_layers": int(layers)} if layers else {}
    config = AutoConfig.for_model("llama", **{**SHAPES[name], **changes}, dtype="bfloat16")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    entries = [
        Entry(name=n, dtype=torch.bfloat16, shape=tuple(t.shape))
        for n, t in model.state_dict().items()
        if n not in tied
    ]
    shards = plan_shards(entries, 5_000_000_000)
    if not (folder / "config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        values = torch.randn(1 << 24).mul_(0.02).to(torch.bfloat16)
        shapes = {e.name: e.shape for e in entries}

        def pieces(name: str, dtype: torch.dtype) -> Any:
            shape = shapes[name]
            if len(shape) == 1:
                yield torch.ones(shape, dtype=torch.bfloat16)
                return
            rows = max(1, len(values) // shape[1])
            for first in range(0, shape[0], rows):
                n = min(rows, shape[0] - first)
                yield values[: n * shape[1]].view(n, shape[1])

        for file, group in shards.items():
            write_shard(folder / file, group, pieces)
        if len(shards) > 1:
            write_json(index_of(shards), folder / "model.safetensors.index.json")
        save_tokenizer(folder)
        config.save_pretrained(folder)
    return sum(e.n_bytes for e in entries)


def make_adapter(base: Path, folder: Path) -> None:
    """An adapter of rank 16 on all linears, saved by PEFT."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    if (folder / "adapter_config.json").is_file():
        return
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model = get_peft_model(
        model, LoraConfig(r=LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM"), low_cpu_mem_usage=True
    )
    from safetensors.torch import save_file

    weights = {
        name.replace(".default", ""): torch.randn(p.shape) * (0.02 if "lora_A" in name else 0.01)
        for name, p in model.named_parameters()
        if "lora_" in name
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config["default"].save_pretrained(folder)


def write_bandwidth(folder: Path, n_bytes: int = 4_000_000_000) -> float:
    """Bytes a second of a plain write of random-looking blocks, fsync included."""
    block, file = os.urandom(1 << 24), folder / "bandwidth"
    begun = time.monotonic()
    with file.open("wb", buffering=0) as opened:
        for _ in range(n_bytes // len(block)):
            opened.write(block)
        os.fsync(opened.fileno())
    seconds = time.monotonic() - begun
    file.unlink()
    return n_bytes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--base", default="original")
    parser.add_argument("--maximum-memory-usage", type=float, default=0.9)
    parser.add_argument("--no-check", action="store_true")
    parser.add_argument("--ballast-gib", type=float, default=0.0, help="leave only so much of the card free")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    base = asked.folder / asked.shape.replace(":", "-")
    n_bytes = make_base(asked.shape, base)
    make_adapter(base, asked.folder / f"{base.name}-adapter")
    os.sync()
    disk = write_bandwidth(asked.folder)
    settings = {"base": asked.base, "maximum_memory_usage": asked.maximum_memory_usage, "check": not asked.no_check}
    target = asked.folder / f"{base.name}-merged"
    arguments = json.dumps([str(base), str(asked.folder / f"{base.name}-adapter"), str(target), settings])
    with ballast(asked.ballast_gib):
        done = subprocess.run([sys.executable, "-c", MERGE, arguments], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    told = json.loads(done.stdout.splitlines()[-1])
    rate = n_bytes / told["merge_seconds"]
    line = {
        "shape": asked.shape, **settings, "ballast_gib": asked.ballast_gib, "n_bytes": n_bytes,
        "disk_bytes_per_second": disk, "bytes_per_second": rate, "share_of_disk": rate / disk,
        "command": " ".join(["python", *sys.argv]),
        "python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count(),
        **{k: v for k, v in told.items() if k not in ("path", "base", "dtype", "n_bytes")},
    }  # fmt: skip
    for name, value in line.items():
        print(f"{name:24} {value}")
    if asked.out:
        with asked.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
