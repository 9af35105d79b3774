"""A workload on the user's path: ``nbqlora.finetune``, watched by its own events.

The rows are text of more than ``seq`` tokens, cut at ``max_length``: every row is full, all of it is learned, and a
step has as many tokens as the bare loop's. What is not the workload is left as a user finds it: learning rate and
schedule, clipping, the checkpoint at the end.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.bench.make_model import sentences
from tests.bench.measured import Measured, allocated, begin_profile, end_profile
from tests.bench.turns import my_turn

if TYPE_CHECKING:
    from nbqlora.core.events import Event, StepEvent
    from tests.bench.engine import Workload


class _Watch:
    """Takes the figures from a run's events: when training begins, and each step."""

    def __init__(self, workload: Workload, found: Measured) -> None:
        self._workload, self._found, self._load_began = workload, found, 0.0
        self._profiler: Any = None

    def __call__(self, event: Event) -> None:
        from nbqlora.core.events import PhaseEvent, StepEvent

        if isinstance(event, PhaseEvent) and event.phase == "load":
            self._load_began = event.elapsed_seconds
        elif isinstance(event, PhaseEvent) and event.phase == "train":
            self._found.load_seconds = event.elapsed_seconds - self._load_began
            self._found.base_bytes = allocated()
            my_turn(self._workload.turns, self._workload.of)
        elif isinstance(event, StepEvent):
            self._step(event)

    def _step(self, event: StepEvent) -> None:
        measured = self._workload.warmup + self._workload.steps
        if event.step <= measured:
            if event.n_tokens != self._workload.bs * self._workload.seq:
                raise RuntimeError(f"step {event.step} had {event.n_tokens} tokens")
            self._found.seconds.append(event.seconds)
            self._found.losses.append(event.loss)
            self._found.peak_bytes = event.peak_bytes
        if self._workload.profile and event.step == measured:
            self._profiler = begin_profile()
        elif self._profiler is not None:  # one step later
            end_profile(self._profiler, self._found)
            self._profiler = None


def limits(workload: Workload) -> dict[str, Any]:
    """What the workload says of memory, as options."""
    given = {"vram_gib": workload.vram_gib, "ram_gib": workload.ram_gib}
    return {name: value for name, value in given.items() if value is not None}


def finetune(workload: Workload) -> Measured:
    """Run it."""
    import nbqlora

    found = Measured()
    steps = workload.warmup + workload.steps + (2 if workload.profile else 0)
    rows = [{"text": text} for text in sentences(steps * workload.bs, workload.seq)]
    layout: dict[str, Any] = {"packing": True} if workload.packing else {"packing": False, "padding_free": False}
    with tempfile.TemporaryDirectory() as folder:
        run = nbqlora.finetune(
            model=str(workload.model),
            data=rows,
            output_dir=str(Path(folder) / "run"),
            observe=_Watch(workload, found),
            max_length=workload.seq,
            max_steps=steps,
            per_device_train_batch_size=workload.bs,
            gradient_accumulation_steps=1,
            gradient_checkpointing=workload.policy,
            dtype=workload.dtype,
            optim=workload.optim,
            lora_r=workload.r,
            lora_alpha=workload.r,
            **layout,
            **limits(workload),
        )
        found.plan = run.plan
        run.free()
    return found
