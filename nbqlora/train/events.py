"""Trainer's callbacks -> events. The one place that knows both."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

from transformers import TrainerCallback

from nbqlora.core.events import EvalEvent, Observer, PhaseEvent, StepEvent, StoppedEvent
from nbqlora.train.stop import Stop


class StepMeter:
    """What the trainer counts for the step at hand: filled by the trainer, read by the callback."""

    def __init__(self) -> None:
        self.loss = float("nan")
        self.n_tokens = 0
        self.eval_loss = float("nan")


class EventCallback(TrainerCallback):
    """Turns the loop's moments into events, and a requested stop into an orderly end.

    Args:
        emit: takes each event.
        meter: the trainer's counts.
        stop: asked after each step.
        peak: bytes, highest since the run began.
        clock: seconds since the run began.
    """

    def __init__(
        self,
        *,
        emit: Observer,
        meter: StepMeter,
        stop: Stop,
        peak: Callable[[], int],
        clock: Callable[[], float],
    ) -> None:
        self._emit, self._meter, self._stop, self._peak, self._clock = emit, meter, stop, peak, clock
        self._mark = perf_counter()
        self._seconds = 0.0
        self._ending = ""
        self.step = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The loop starts."""
        self._emit(PhaseEvent(phase="train", detail=f"{state.max_steps} steps", elapsed_seconds=self._clock()))
        self._mark = perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A step is whole: adapter, optimizer and schedule are consistent, so here a run may end."""
        now = perf_counter()
        self._seconds, self._mark = now - self._mark, now
        self.step = state.global_step
        control.should_log = True  # every step is an event, whatever logging_steps says
        reason = self._stop.reason
        if reason and state.global_step < state.max_steps:
            control.should_training_stop = True
            self._ending = reason

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        """A step's figures; Trainer's last log, which holds no loss, is passed over."""
        if logs is None or "loss" not in logs:
            return
        norm = logs.get("grad_norm")
        self._emit(
            StepEvent(
                step=state.global_step,
                total_steps=state.max_steps,
                loss=self._meter.loss,
                learning_rate=float(logs.get("learning_rate", 0.0)),
                grad_norm=None if norm is None else float(norm),
                n_tokens=self._meter.n_tokens,
                seconds=self._seconds,
                peak_bytes=self._peak(),
                elapsed_seconds=self._clock(),
            )
        )
        if self._ending:
            self._emit(StoppedEvent(step=state.global_step, reason=self._ending, elapsed_seconds=self._clock()))
            self._ending = ""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A stopped run saves at once, without the evaluation that the end of an epoch would bring."""
        if self._stop.reason:
            control.should_evaluate = False

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation is done; its time belongs to no step."""
        event = EvalEvent(step=state.global_step, loss=self._meter.eval_loss, elapsed_seconds=self._clock())
        self._emit(event)
        self._mark = perf_counter()
