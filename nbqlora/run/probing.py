"""The probe step of a run: the plan is corrected when its longest micro-batch was tried, and that is told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from nbqlora.engine.loaded import LoadedModel
from nbqlora.planner.probed import corrected, in_words
from nbqlora.train.enduring_trainer import EnduringTrainer
from nbqlora.train.probe_step import Measure, ProbeStep


class ProbeCallback(TrainerCallback):
    """Probes when the optimizer has its states: added behind the callbacks that make them.

    Args:
        tell: takes what was found, in a line.
    """

    def __init__(
        self, trainer: EnduringTrainer, loaded: LoadedModel, measure: Measure, tell: Callable[[str], None]
    ) -> None:
        self._step, self._loaded, self._tell = ProbeStep(trainer, loaded, measure), loaded, tell

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Nothing was trained, evaluated or drawn yet."""
        probed = self._step()
        assert self._loaded.plan is not None
        plan = self._loaded.plan = corrected(self._loaded.plan, probed)
        self._tell(in_words(plan, probed))
