"""Two processes that train together, one of which runs out of memory. Each writes what became of its runs as JSON."""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nbqlora.core.specs import LayerPolicy
from tests import tiny
from tests.train.parts import parts
from tests.train.shortages import Shortages, shortages

OPTIONS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": None,
           "lora_dropout": 0.1, "max_steps": 2, "gpus": 2}  # fmt: skip


def digest(model: Any) -> list[float]:
    return [float(p.double().sum()) for p in tiny.lora_parameters(model).values()]


def run(rank: int, model: str, out: Path, failing: str) -> dict[str, Any]:
    """Train, each rank on its share of a step; ``failing`` on rank 1."""
    with pytest.MonkeyPatch.context() as patch:
        short = Shortages(patch)
        made = parts(Path(model), tiny.make_rows(16), out, **OPTIONS)
        if rank == 1 and failing == "once":
            short.at("forward", 5)
        if rank == 1 and failing == "while":
            short.when("backward", lambda layer, x: layer.policy is LayerPolicy.KEEP)
        short.watch(made.loaded.model)
        made.trainer.train()
    assert made.loaded.plan is not None
    return {
        "losses": made.losses,
        "adapter": [float(p.double().sum()) for p in tiny.lora_parameters(made.loaded.model).values()],
        "policies": [p.value for p in made.loaded.plan.layer_policies],
        "actions": [(e.step, e.phase, e.action) for e in shortages(made.events)],
        "failed": len(short.failed),
        "backwards": short.calls["backward"],
    }


def rank(number: int, model: str, out: str) -> None:
    """One process: all runs, one after another."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/together", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    told = {how: run(number, model, Path(out) / f"{how}-{number}", how) for how in ("never", "once", "while")}
    (Path(out) / f"rank-{number}.json").write_text(json.dumps(told))
    dist.destroy_process_group()


def main(model: str, out: str) -> None:
    """Both ranks."""
    torch.multiprocessing.spawn(rank, args=(model, out), nprocs=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
