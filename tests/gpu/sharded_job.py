"""One of two cards that have the layers' weights split over both; what it saw goes to a file.

``python -m tests.gpu.sharded_job MODEL FOLDER`` with the variables that torchrun sets, and one card visible.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import nbqlora
from nbqlora.core.events import EvalEvent, OomEvent, StepEvent
from nbqlora.engine import micro_step
from nbqlora.engine.sharded import ShardedLayer
from tests.gpu.test_oom_gpu import rows

OPTIONS: dict[str, Any] = {
    "max_length": 1024, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4,
    "learning_rate": 1e-3, "lora_r": 8, "lora_dropout": 0.0, "warmup_ratio": 0, "gradient_checkpointing": "none",
    "packing": False, "padding_free": False, "dtype": "bf16",
}  # fmt: skip
# Of what the run had before; the weights are a tenth of it.
LEFT_SHARE = 0.8


def bits(device: torch.device) -> list[bool]:
    """Whether every pair of bytes comes back as it was; as bf16, NaNs would not."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    packed = torch.cat([pairs, pairs.flip(0), pairs[:6]])
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(packed.clone()[:, None], requires_grad=False)
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(dist.group.WORLD, "cuda")
    layer, found = ShardedLayer({"x": linear}, mesh, device), []
    for _ in range(2):
        layer.gather()
        layer.open()
        found.append(torch.equal(linear.weight.data.flatten().cpu(), packed))
        layer.close()
    return found


class ShortAfter:
    """Leaves this card less memory from a step on."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == self.step:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(LEFT_SHARE * event.peak_bytes / total)


def finetune(model: str, out: Path, observe: Any = None, **changes: Any) -> dict[str, Any]:
    """A run, and its figures."""
    options = {**OPTIONS, "data": rows(32), "eval_data": rows(4), **changes}
    try:
        run = nbqlora.finetune(model=model, output_dir=str(out), observe=observe, **options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    report, plan = run.report, run.plan
    found = {
        "losses": [e.loss for e in report.steps],
        "evals": [e.loss for e in run.events if isinstance(e, EvalEvent)],
        "shards": plan.shards,
        "policies": [policy.value for policy in report.plan.layer_policies],
        "planned": plan.predicted_peak_bytes,
        "measured": report.measured_peak_bytes,
        "short": sum(isinstance(e, OomEvent) for e in run.events),
    }
    run.free()
    return found


class Profiled:
    """Profiles the card from behind a step on: kernels are compiled and timed, and layers probed, before that."""

    def __init__(self, step: int) -> None:
        from torch.profiler import ProfilerActivity, profile

        self.step, self.profiler = step, profile(activities=[ProfilerActivity.CUDA])

    def __call__(self, event: Any) -> None:
        if isinstance(event, StepEvent) and event.step == self.step:
            torch.cuda.synchronize()
            self.profiler.start()


def overlap(model: str, out: Path) -> dict[str, int]:
    """Gathers of the steps behind the second one, and those beside which another kernel ran."""
    seen = Profiled(2)
    # Tokens enough that the card is busy, and not waiting for what is launched: a gather ends in some 50 us.
    long = {"max_length": 4096, "per_device_train_batch_size": 16}
    finetune(model, out, observe=seen, data=rows(64, words=4000), fsdp=True, eval_data=None, **long)
    seen.profiler.stop()
    # Ranges that FSDP and torch.distributed name are shown on the card too, and last as long as the gather in them.
    on_card = [
        e
        for e in seen.profiler.events()
        if e.device_type == torch.autograd.DeviceType.CUDA
        and not (e.is_user_annotation or e.name.startswith(("FSDP::", "nccl:", "Memset")))
    ]
    spans = [(e.time_range.start, e.time_range.end, "AllGather" in e.name) for e in on_card]
    work = sorted((begin, end) for begin, end, gathers in spans if not gathers)
    all_gathers = [(begin, end) for begin, end, gathers in spans if gathers]
    beside = sum(any(begin < b and a < end for a, b in work) for begin, end in all_gathers)
    return {"gathers": len(all_gathers), "beside": beside}


def main(model: str, folder: str) -> None:
    """One rank; a run on all weights is launched kernel by kernel too, so that both allocate the same."""
    rank, out = int(os.environ["RANK"]), Path(folder)
    torch.cuda.set_device(0)
    dist.init_process_group("cpu:gloo,cuda:nccl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_step, "CAPTURED_TOKENS", 0)
        told: dict[str, Any] = {"bits": bits(torch.device("cuda", 0))}
        for name, fsdp in (("split", True), ("whole", False)):
            told[name] = finetune(model, out / f"{name}-{rank}", fsdp=fsdp)
        told["full"] = finetune(model, out / f"full-{rank}", fsdp=True, gradient_checkpointing="full")
        told["offload"] = finetune(model, out / f"of-{rank}", fsdp=True, gradient_checkpointing="offload")
        short = ShortAfter(2) if rank == 1 else None
        told["short"] = finetune(model, out / f"short-{rank}", observe=short, fsdp=True)
        told["overlap"] = overlap(model, out / f"profile-{rank}")
    (out / f"rank-{rank}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
