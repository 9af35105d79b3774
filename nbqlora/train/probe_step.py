"""A probe step: the longest micro-batch, forward and backward, before step 1; what it took, and nothing else of it.

A plan's bytes are arithmetic, and a card has its own opinion. The largest batch that the rows can make is run once the
optimizer's states are there, so that its peak is that of training. Memory that runs out, or a peak above what the run
may take, lowers the run by a rung here, not in the middle of an epoch.

Nothing of it may be seen in the training. Random numbers are put back where they stood; gradients are cleared, the
buffer behind them too; the loss scale, the optimizer and the data loader are not touched; and what was captured is
dropped, so that the run meets each shape for the first time, as without a probe. That the loss is no number is not
looked at: the step that learns these rows finds it, and names them.

On a card that captures, a shape is launched kernel by kernel the first time, captured the second, and only replayed
from then on. Each has a peak of its own, so both are taken; the time is that of one more, unless a micro-batch is so
slow that what was compiled and captured makes no difference. Whether it is, is the plan's guess: processes that train
together must do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch

from nbqlora.core.plan import Probed
from nbqlora.engine.fused import engine_of
from nbqlora.engine.head import IGNORED
from nbqlora.engine.loaded import LoadedModel
from nbqlora.train.batch import count_tokens
from nbqlora.train.enduring_trainer import EnduringTrainer
from nbqlora.train.oom import PROBE, Shortage, give_back
from nbqlora.train.split import Batch, learned
from nbqlora.train.spread import row_lengths
from nbqlora.train.state import kept_random_state

# A micro-batch that takes longer is not run once more for its time.
SLOW_SECONDS = 10.0
# Of rows that are equally long, so many are looked at for their learned tokens.
LOOKED_AT = 256

# Does work as a phase of this name, and returns the bytes of its peak.
Measure = Callable[[str, Callable[[], None]], int]
Integers = np.ndarray[Any, np.dtype[np.int64]]


class ProbeStep:
    """Tries the longest micro-batch of a trainer that is about to begin.

    Args:
        trainer: its optimizer has its states.
        loaded: its model; a rung that is taken changes its plan.
        measure: does the work as a phase of its own.
    """

    def __init__(self, trainer: EnduringTrainer, loaded: LoadedModel, measure: Measure) -> None:
        self._trainer, self._loaded, self._measure = trainer, loaded, measure
        self._on_card = loaded.device.type == "cuda"

    def __call__(self) -> Probed:
        """What it took, on the rung that it left the run on.

        Raises:
            MemoryExhaustedError: it does not fit, whatever is lowered.
        """
        begun = perf_counter()
        with kept_random_state():
            try:
                tokens, peak, seconds = self._fitting()
            finally:
                self._leave_nothing()
        return Probed(tokens=tokens, peak_bytes=peak, seconds=seconds, total_seconds=perf_counter() - begun)

    def _fitting(self) -> tuple[int, int, float]:
        """Tokens, peak and seconds, measured anew where anything was short."""
        rows = self._rows()
        while True:
            inputs = self._trainer.collate_part()(rows)
            failures, peak, seconds = self._tried(inputs)
            if not failures and not self._trainer.enduring.lower(self._above(peak, inputs)):
                return count_tokens(inputs), peak, seconds

    def _rows(self) -> list[dict[str, Any]]:
        """The rows of the longest micro-batch; packs and rows without padding lie end to end in it."""
        data: Any = self._trainer.train_dataset
        n = min(len(data), self._trainer.args.per_device_train_batch_size)
        return [data[place] for place in longest(data, n)]

    def _tried(self, inputs: Batch) -> tuple[int, int, float]:
        """How often memory ran out, the highest peak, the last pass's seconds."""
        passes = [self._run(inputs)]
        if self._captures:
            passes.append(self._run(inputs))
        if self._on_card and not self._slow():
            passes.append(self._run(inputs))
        failures, peaks, seconds = zip(*passes, strict=True)
        return sum(failures), max(peaks), seconds[-1]

    def _run(self, inputs: Batch) -> tuple[int, int, float]:
        found = [0]

        def work() -> None:
            found[0] = self._trainer.rehearse(inputs)
            if self._on_card:
                torch.cuda.synchronize(self._loaded.device)

        begun = perf_counter()
        peak = self._measure(PROBE, work)
        return found[0], peak, perf_counter() - begun

    @property
    def _captures(self) -> bool:
        return self._loaded.micro_step().captures and self._loaded.captures

    def _slow(self) -> bool:
        plan = self._loaded.plan
        assert plan is not None
        return (plan.step_seconds or 0.0) / plan.gradient_accumulation_steps > SLOW_SECONDS

    def _above(self, peak: int, inputs: Batch) -> Shortage | None:
        """What the peak is above the limit, as a shortage; None where it is not."""
        plan = self._loaded.plan
        assert plan is not None
        if peak <= plan.usable_bytes:
            return None
        tokens, documents = inputs["input_ids"].numel(), len(learned(inputs))
        return Shortage(phase=PROBE, asked_bytes=peak - plan.usable_bytes, tokens=tokens, n_documents=documents)

    def _leave_nothing(self) -> None:
        """What was captured and cached is gone, and the gradients' buffer is as it was."""
        self._loaded.release()
        engine = engine_of(self._loaded.model)
        if engine is not None and engine.scratch.adapters is not None:
            engine.scratch.adapters.all_gradients().zero_()
        if self._on_card:
            give_back(self._loaded.device)


def longest(data: Any, n: int) -> list[int]:
    """Places of the ``n`` rows with the most tokens; of those as long, the ones with the most learned.

    Args:
        data: a ``datasets.Dataset`` with ``input_ids`` and ``labels``.
    """
    lengths = np.array(row_lengths(data))
    order = np.argsort(-lengths, kind="stable")
    least = lengths[order[n - 1]]
    sure, ties = order[lengths[order] > least], order[lengths[order] == least][:LOOKED_AT]
    by_learned = ties[np.argsort(-_learned(data, ties), kind="stable")]
    return [*map(int, sure), *map(int, by_learned[: n - len(sure)])]


def _learned(data: Any, places: Integers) -> Integers:
    """Learned tokens of these rows."""
    labels: Any = data.select(places).with_format("arrow")[:].column("labels").combine_chunks()
    ends = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORED)])
    offsets = labels.offsets.to_numpy()
    return np.diff(ends[offsets - offsets[0]])
