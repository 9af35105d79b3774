"""What a stop needs of Trainer: data workers that outlive an interrupt, evaluations that can be cut short."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from nbqlora.train.stop import EvaluationCutError
from nbqlora.train.workers import shield_workers


class InterruptibleTrainer(Trainer):
    """Stands before TRL's trainer among the bases."""

    def get_train_dataloader(self) -> Any:
        """The loader, its workers deaf to interrupts."""
        return shield_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The loader, its workers deaf to interrupts."""
        return shield_workers(super().get_eval_dataloader(eval_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The metrics; a loss that is unknown where the evaluation was cut short."""
        try:
            return super().evaluate(*args, **kwargs)
        except EvaluationCutError:
            return {"eval_loss": float("nan")}
