"""One model on the card, run by one plan after another: an 8B takes longer to load than a plan takes to be measured.

The same path as ``engine.py loop``: ``nbqlora.load``, ``micro_step`` and the trainer's optimizer. Between two plans the
model goes on by ``LoadedModel.run_as``; what the one before left (graphs, optimizer, slab, cache) is given back first,
and ``base_gib`` of each line shows that it was.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import nbqlora
from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats
from nbqlora.memory.device import device_spec
from nbqlora.planner import make_plan
from nbqlora.run.session import Session, collect
from nbqlora.train.whole_step import make_states
from tests.bench.make_model import VOCAB
from tests.bench.measured import Measured, allocated, device, wait
from tests.bench.stacks import LINEARS, RATE

IGNORED = -100
# What the model is given for one micro-batch, on its device.
Batch = Mapping[str, torch.Tensor]


class Replanned:
    """A loaded model that is measured under any plan for it.

    Args:
        folder: made by make_model.py.
        dtype, r: arithmetic and rank; another one is another load.
    """

    def __init__(self, folder: Path, *, dtype: str, r: int) -> None:
        self._fixed = {
            "model": str(folder),
            "dtype": dtype,
            "lora_r": r,
            "lora_alpha": r,
            "lora_dropout": 0.0,
            "target_modules": tuple(LINEARS),
        }
        self.machine = device_spec(".")  # before the model lies there
        start = time.perf_counter()
        self.loaded = nbqlora.load(**self._fixed, per_device_train_batch_size=1, max_length=64)
        self.loaded.model.train()
        wait()
        self.load_seconds = time.perf_counter() - start

    def plan(self, data: DataStats, **options: Any) -> Plan:
        """The plan for this model on the card as it was before loading. Raises :class:`DoesNotFitError`."""
        config = FinetuneConfig(data=[], **self._fixed, **options)
        return make_plan(config, self.loaded.spec, self.machine, data, output_dir=".")

    def run(self, plan: Plan, steps: Sequence[Sequence[Batch]], *, optim: str = "adamw_torch_fused") -> Measured:
        """Take the steps as the plan says.

        Args:
            steps: micro-batches of each.

        Returns:
            Seconds and losses by step, and the peak from before the first one on, the optimizer's states included.
        """
        loaded, found = self.loaded, Measured(plan=plan, load_seconds=self.load_seconds)
        loaded.run_as(plan)
        collect()
        found.base_bytes = allocated()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        try:
            optimizer = loaded.optimizer(learning_rate=RATE, optim=optim)
            make_states(optimizer)  # before the first step, as the trainer does
            for batches in steps:
                wait()
                start = time.perf_counter()
                loss = self._step(optimizer, batches)
                wait()
                found.seconds.append(time.perf_counter() - start)
                found.losses.append(float(loss))
            if torch.cuda.is_available():
                found.peak_bytes = torch.cuda.max_memory_allocated()
                found.reserved_bytes = torch.cuda.max_memory_reserved()
        finally:
            loaded.model.zero_grad(set_to_none=True)
            loaded.give_up_step()
        return found

    def _step(self, optimizer: Any, batches: Sequence[Batch]) -> torch.Tensor:
        """One optimizer step, as the trainer takes it: the loss is the mean over the tokens of all micro-batches."""
        micro_step = self.loaded.micro_step()
        count = torch.stack([(batch["labels"][:, 1:] != IGNORED).sum() for batch in batches]).sum()
        total = torch.stack([micro_step(batch, 1.0 / count.float()) for batch in batches]).sum()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / count


@contextmanager
def replanned(folder: Path, *, dtype: str, r: int) -> Iterator[Replanned]:
    """A :class:`Replanned` whose memory is given back at the end."""
    session = Session("bench", busy=True)
    try:
        stand = Replanned(folder, dtype=dtype, r=r)
        session.loaded = stand.loaded
        yield stand
    finally:
        session.free()


def rows_of(n: int, seq: int, numbers: torch.Generator) -> Batch:
    """``n`` rows of random tokens, all learned."""
    ids = torch.randint(3, VOCAB, (n, seq), generator=numbers).to(device())
    return {"input_ids": ids, "labels": ids}


def documents_of(lengths: Sequence[int], numbers: torch.Generator) -> Batch:
    """Documents of random tokens end to end, as TRL's collator lays them: the first token of each is not learned."""
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=numbers)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    boundaries = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    batch = {
        "input_ids": ids,
        "labels": ids.masked_fill(positions == 0, IGNORED),
        "position_ids": positions,
        "cu_seq_lens_q": boundaries,
    }
    return {name: tensor.to(device()) for name, tensor in batch.items()}
