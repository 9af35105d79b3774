"""Two processes that train together with their layers' weights split over both; each writes what became of its runs.

``python -m tests.train.sharded_ranks MODEL FOLDER``
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from nbqlora.core.errors import MemoryExhaustedError, ModelError
from nbqlora.core.events import EvalEvent
from nbqlora.core.specs import LayerPolicy, MemoryCategory
from nbqlora.engine.fused import engine_of
from nbqlora.engine.generate import generate
from nbqlora.engine.sharded import ShardedLayer, shards_of
from nbqlora.run.holdings import holdings
from tests import tiny
from tests.quick import quick_runs
from tests.train import parts as made_of
from tests.train.shortages import Shortages, out_of_memory, shortages

KEEP, MLP, ALL, OFFLOAD = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE, LayerPolicy.OFFLOAD
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "effective_batch_size": None,
    "max_steps": 2, "gpus": 2, "lora_dropout": 0.1, "eval_data": tiny.make_rows(5, seed=1),
}  # fmt: skip
MIXES = {
    "keep": (KEEP, KEEP, KEEP),
    "recompute": (ALL, ALL, ALL),
    "mlp": (MLP, MLP, MLP),
    "offload": (OFFLOAD, OFFLOAD, OFFLOAD),
    "mixed": (OFFLOAD, MLP, KEEP),
}
SLOT_BYTES = 1 << 20
# What fails once on the second rank: the place and the number of the call, of 3 layers and 2 micro-batches a step.
ONCE = {"forward": 5, "backward": 2, "chunk": 3, "eval": 2}
# Gathers that find no memory there: an evaluation before step 1 has 6, a micro-batch 5, and those that are caught up.
NO_ROOM = {
    "no room to gather": ("gather", (9,)),
    "no room to open": ("open", (15,)),
    "no room to catch up": ("gather", (15, 16)),
}


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for p in tiny.lora_parameters(model).values():
        found.update(p.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def held_bytes() -> int:
    """Of all tensors that Python knows, each storage once."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    storages = {}
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Runs:
    """Runs on one model, of this rank."""

    def __init__(self, model: str, folder: Path, rank: int) -> None:
        self._model, self._folder, self._rank, self._n = Path(model), folder, rank, 0

    @contextmanager
    def made(self, shards: int, mix: str, **options: Any) -> Iterator[made_of.Parts]:
        """Everything up to ``train()``."""
        make_plan = made_of.make_plan
        policies = MIXES[mix]
        host = policies.count(OFFLOAD) * SLOT_BYTES

        def as_asked(*args: Any, **kwargs: Any) -> Any:
            plan = make_plan(*args, **kwargs)
            return replace(plan, shards=shards, layer_policies=policies, host_bytes=host)

        self._n += 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(made_of, "make_plan", as_asked)
            out = self._folder / f"{self._n}-{self._rank}"
            yield made_of.parts(self._model, tiny.make_rows(16), out, **{**OPTIONS, **options})

    def train(
        self, shards: int = 2, mix: str = "keep", failing: Callable[[Shortages], None] | None = None, **options: Any
    ) -> dict[str, Any]:
        """A whole training; what is told of it.

        Args:
            failing: says what fails on the second rank.
        """
        with pytest.MonkeyPatch.context() as patch, self.made(shards, mix, **options) as run:
            short = Shortages(patch)
            if self._rank == 1 and failing is not None:
                failing(short)
            short.watch(run.loaded.model)
            error = ""
            try:
                run.trainer.train()
            except MemoryExhaustedError as found:
                error = str(found)
        assert run.loaded.plan is not None
        split = shards_of(run.loaded.model)
        return {
            "losses": run.losses,
            "evals": [e.loss for e in run.events if isinstance(e, EvalEvent)],
            "adapter": digest(run.loaded.model),
            "policies": [p.value for p in run.loaded.plan.layer_policies],
            "actions": [(e.step, e.phase, e.action) for e in shortages(run.events)],
            "failed": len(short.failed),
            "passes": split.passes if split is not None else 0,
            "error": error,
        }

    def holdings(self, shards: int) -> dict[str, Any]:
        """Bytes that this process holds after a step, beyond what it held before, and of the shares."""
        before = held_bytes()
        with self.made(shards, "keep") as run:
            run.trainer.train()
        split, model = shards_of(run.loaded.model), run.loaded.model
        linears = [m for m in model.modules() if type(m).__module__.startswith("bitsandbytes")]
        found: dict[str, Any] = {
            "held": held_bytes() - before,
            "counted": holdings(run.loaded)[MemoryCategory.WEIGHTS],
            "packed": sum(m.weight.quant_state.shape.numel() // 2 for m in linears),
            "bound": sum(m.weight.numel() for m in linears),
        }
        if split is not None:
            found["shares"] = [layer.share.nbytes for layer in split.layers]
            found["opened"] = []
            for place in range(len(split.layers)):
                with split.alone(place):
                    time.sleep(0.1)  # gloo's thread lets go of what came a moment later
                    opened = held_bytes()
                found["opened"].append(opened - held_bytes())
        return found

    def closed(self) -> dict[str, str]:
        """What a closed layer, or one whose turn it is not, says."""
        said = {}
        with self.made(2, "keep") as run:
            model, split = run.loaded.model, shards_of(run.loaded.model)
            engine = engine_of(model)
            assert split is not None and engine is not None
            layer, ids = next(iter(engine.layers.values())), torch.ones(1, 4, dtype=torch.int64)
            tries: dict[str, Callable[[], Any]] = {
                "generate": lambda: generate(run.loaded, ["sun"], max_new_tokens=2),
                "own forward": lambda: model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1]])),
                "weight": lambda: sharded_weight(layer),
                "turn": lambda: open_out_of_turn(split),
                "join": lambda: run.loaded.run_as(
                    replace(run.plan, layer_policies=(ALL, LayerPolicy.JOIN, LayerPolicy.JOIN))
                ),
            }
            for name, work in tries.items():
                try:
                    said[name] = str(work())
                except (ModelError, RuntimeError) as error:
                    said[name] = f"{type(error).__name__}: {error}"
            said["captures"] = str(run.loaded.micro_step().captures)
        return said


def sharded_weight(layer: Any) -> torch.Tensor:
    from nbqlora.engine.lora_blocks import weight_with_a

    return weight_with_a(layer.qkv, 0, torch.float32, layer.scratch)


def open_out_of_turn(split: Any) -> None:
    split.begin_pass(trains=False)
    try:
        with split.opened(1):
            pass
    finally:
        split.finish_pass()


def bits(rank: int) -> list[bool]:
    """Whether every pair of bytes comes back as it was, from both shares."""
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.uint8)
    packed = torch.cat([pairs, pairs.flip(0), pairs[:6]])
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight = torch.nn.Parameter(packed.clone()[:, None], requires_grad=False)
    mesh = torch.distributed.device_mesh.DeviceMesh.from_group(dist.group.WORLD, "cpu")
    layer = ShardedLayer({"x": linear}, mesh, torch.device("cpu"))
    found = [linear.weight.numel() == 0]
    for _ in range(2):
        layer.gather()
        layer.open()
        found.append(torch.equal(linear.weight.data.flatten(), packed))
        layer.close()
        found.append(linear.weight.numel() == 0)
    return [*found, layer.share.nbytes == -(-packed.numel() // 16) * 16 // 2]


def fails_at(place: str, number: int) -> Callable[[Shortages], None]:
    return lambda short: short.at(place, number)


def no_room_to(patch: pytest.MonkeyPatch, method: str, numbers: tuple[int, ...], found: Shortages) -> None:
    """A gather that finds no memory, to be issued or to be opened, in these of its calls on this rank."""
    calls: list[int] = []
    whole = getattr(ShardedLayer, method)

    def short(self: ShardedLayer) -> None:
        calls.append(len(calls) + 1)
        if calls[-1] in numbers:
            found.failed.append(method)
            raise out_of_memory()
        whole(self)

    patch.setattr(ShardedLayer, method, short)


def everything(model: str, folder: Path, rank: int) -> dict[str, Any]:
    """All runs, by name."""
    runs = Runs(model, folder, rank)
    told: dict[str, Any] = {"bits": bits(rank), "closed": runs.closed()}
    told["holdings"] = {n: runs.holdings(n) for n in (1, 2)}
    told["whole"] = runs.train(1)
    told["mixes"] = {mix: runs.train(2, mix) for mix in MIXES}
    told["once"] = {name: runs.train(failing=fails_at(name.split()[-1], number)) for name, number in ONCE.items()}
    told["while"] = runs.train(failing=lambda s: s.when("backward", lambda layer, x: layer.policy is KEEP))
    told["never"] = runs.train(failing=lambda s: s.when("forward", lambda layer, x: True))
    # More than one document of any row: rank 1 has it in parts, and rank 0 gathers as often.
    told["parts"] = runs.train(failing=lambda s: s.when("forward", lambda layer, x: x.shape[0] > 64), lora_dropout=0.0)
    told["not in parts"] = runs.train(lora_dropout=0.0)
    for name, (method, numbers) in NO_ROOM.items():
        with pytest.MonkeyPatch.context() as patch:
            told[name] = runs.train(failing=partial(no_room_to, patch, method, numbers))
    return told


def rank(number: int, model: str, out: str) -> None:
    """One process."""
    dist.init_process_group(
        "gloo", init_method=f"file://{out}/together", rank=number, world_size=2, timeout=timedelta(seconds=60)
    )
    with quick_runs():
        told = everything(model, Path(out), number)
    (Path(out) / f"rank-{number}.json").write_text(json.dumps(told))
    gc.collect()
    dist.destroy_process_group()


def main(model: str, out: str) -> None:
    """Both ranks."""
    torch.multiprocessing.spawn(rank, args=(model, out), nprocs=2)


if __name__ == "__main__":
    main(*sys.argv[1:])
