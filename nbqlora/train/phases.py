"""Trainer's moments as phases of the memory profile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback


class PhaseCallback(TrainerCallback):
    """Says when the optimizer runs; the trainer itself says forward, backward, step and evaluation.

    Args:
        enter: takes a phase's name.
        count: given the optimizer once, behind its first step: the moment when gradients and states are both there.
    """

    def __init__(self, enter: Callable[[str], None], count: Callable[[Any], None]) -> None:
        self._enter, self._count, self._counted = enter, count, False

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients of the step are there."""
        self._enter("optimizer")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimizer is done; the gradients are not cleared yet."""
        if not self._counted:
            self._counted = True
            self._count(kwargs["optimizer"])
