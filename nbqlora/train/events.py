"""Trainer's callbacks -> events. The one place that knows both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

from transformers import TrainerCallback

from nbqlora.core.events import EvalEvent, NoteEvent, Observer, OomEvent, PhaseEvent, StepEvent, StoppedEvent
from nbqlora.train.stop import EvaluationCutError, Stop


class Numbers(Protocol):
    """A step's figures that are still on their way from the card."""

    n_tokens: int

    def read(self) -> tuple[float, float | None]:
        """Wait for loss and gradient norm; raises NonFiniteLossError where the step had none that is finite."""


class StepMeter:
    """What the trainer counts for the step at hand: filled by the trainer, read by the callback.

    ``numbers`` is None where loss and tokens are known when the step ends.
    """

    def __init__(self) -> None:
        self.loss = float("nan")
        self.n_tokens = 0
        self.eval_loss = float("nan")
        self.numbers: Numbers | None = None


@dataclass(kw_only=True)
class _Waiting:
    """A step that is done, but not told yet."""

    step: int
    total_steps: int
    learning_rate: float
    seconds: float
    numbers: Numbers


class EventCallback(TrainerCallback):
    """Turns the loop's moments into events, and a requested stop into an orderly end.

    Args:
        emit: takes each event.
        meter: the trainer's counts.
        stop: asked after each step.
        peak: bytes, highest since the run began.
        clock: seconds since the run began.
        save_seconds: ask for a checkpoint this often, 0 for only at a stop and at the end.
        agree: given why this process would stop, and whether it would save: what all ranks do.
    """

    def __init__(
        self,
        *,
        emit: Observer,
        meter: StepMeter,
        stop: Stop,
        peak: Callable[[], int],
        clock: Callable[[], float],
        save_seconds: float,
        agree: Callable[[str, bool], tuple[str, bool]] = lambda reason, due: (reason, due),
    ) -> None:
        self._emit, self._meter, self._stop, self._peak, self._clock = emit, meter, stop, peak, clock
        self._save_seconds, self._agree = save_seconds, agree
        self._mark = self._saved = perf_counter()
        self._seconds = 0.0
        self._ending = ""
        self._save_at_epoch_end = False
        self._steps_here = 0
        self._waiting: _Waiting | None = None
        self._rate = 0.0

    def flush(self) -> None:
        """Tell the step whose figures were on their way. Raises NonFiniteLossError, naming its rows."""
        waiting, self._waiting = self._waiting, None
        if waiting is None:
            return
        loss, norm = waiting.numbers.read()
        self._emit(
            StepEvent(
                step=waiting.step,
                total_steps=waiting.total_steps,
                loss=loss,
                learning_rate=waiting.learning_rate,
                grad_norm=norm,
                n_tokens=waiting.numbers.n_tokens,
                seconds=waiting.seconds,
                peak_bytes=self._peak(),
                elapsed_seconds=self._clock(),
            )
        )

    def out_of_memory(self, *, step: int, phase: str, asked_bytes: int | None, action: str) -> None:
        """Memory ran out, and what is done about it. Raises NonFiniteLossError where the step before was not finite."""
        self.flush()
        self._emit(
            OomEvent(step=step, phase=phase, asked_bytes=asked_bytes, action=action, elapsed_seconds=self._clock())
        )

    def probed(self, text: str) -> None:
        """A probe step was taken, and what it found; its time belongs to no step."""
        self._emit(NoteEvent(text=text, elapsed_seconds=self._clock()))
        self._mark = self._saved = perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The loop starts."""
        done = f"{state.max_steps - state.global_step} of " if state.global_step else ""
        self._emit(PhaseEvent(phase="train", detail=f"{done}{state.max_steps} steps", elapsed_seconds=self._clock()))
        self._mark = self._saved = perf_counter()
        self._rate = float(kwargs["lr_scheduler"].get_last_lr()[0])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here until the step is told, no second interrupt: an adapter is of one step or of the next.

        The step before is told now at the latest: if it was not finite, the optimizer left the adapter alone, and this
        step must not touch it either.
        """
        self.flush()
        self._stop.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is whole: adapter, optimizer and schedule are consistent, so here a run may end."""
        now = perf_counter()
        self._seconds, self._mark = now - self._mark, now
        self._stop.step_done(self._seconds)
        self._steps_here += 1
        control.should_log = True  # every step is an event, whatever logging_steps says
        reason, due = self._agreed(0 < self._save_seconds <= now - self._saved)
        last = state.global_step >= state.max_steps
        if reason:
            control.should_evaluate = False
        if reason and not last:
            control.should_training_stop = True
            self._ending = reason
        if reason or last or due:
            # The end of an epoch brings an evaluation: a checkpoint behind it has its result.
            self._save_at_epoch_end = bool(reason) or last or float(state.epoch).is_integer()
            control.should_save = not self._save_at_epoch_end
        if self._meter.numbers is not None:
            self._tell_later(state, control, kwargs["lr_scheduler"])

    def _tell_later(self, state: Any, control: Any, scheduler: Any) -> None:
        """The figures are on their way: the next step tells them, unless something happens before that needs them."""
        numbers, self._meter.numbers = self._meter.numbers, None
        assert numbers is not None
        self._waiting = _Waiting(
            step=state.global_step,
            total_steps=state.max_steps,
            learning_rate=self._rate,
            seconds=self._seconds,
            numbers=numbers,
        )
        self._rate = float(scheduler.get_last_lr()[0])
        control.should_log = False
        if self._ending or control.should_save or control.should_evaluate or control.should_training_stop:
            self.flush()
        if self._ending:
            self._tell_stop(state.global_step, self._ending)
            self._ending = ""
        self._stop.release()

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
            self._tell_stop(state.global_step, self._ending)
            self._ending = ""
        self._stop.release()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A stopped run saves at once, without the evaluation that the end of an epoch would bring."""
        self.flush()
        if self._agreed()[0]:
            control.should_evaluate = False
            if not control.should_training_stop:  # asked for since the epoch's last step
                control.should_training_stop = self._save_at_epoch_end = True
                self._tell_stop(state.global_step, self._stop.reason)
        control.should_save, self._save_at_epoch_end = self._save_at_epoch_end, False

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A checkpoint was asked for and written, or could not be; its time belongs to no step."""
        self._mark = self._saved = perf_counter()

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A stop does not wait for the minutes of an evaluation.

        The run then ends with the steps that it has; in the evaluation before the first step, with that step,
        so that a run which is resumed again and again gets on.

        Raises:
            EvaluationCutError: the trainer's ``evaluate`` takes it.
        """
        if not self._agreed()[0]:
            return
        self._emit(NoteEvent(text="this evaluation was cut short", elapsed_seconds=self._clock()))
        self._mark = perf_counter()
        if self._steps_here and state.global_step < state.max_steps and not control.should_training_stop:
            control.should_training_stop = control.should_save = True
            self._tell_stop(state.global_step, self._stop.reason)
        raise EvaluationCutError

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """An evaluation is done; its time belongs to no step."""
        event = EvalEvent(step=state.global_step, loss=self._meter.eval_loss, elapsed_seconds=self._clock())
        self._emit(event)
        self._mark = perf_counter()

    def _agreed(self, due: bool = False) -> tuple[str, bool]:
        """Why all ranks stop here, "" for no stop, and whether they save."""
        reason, due = self._agree(self._stop.reason, due)
        if reason:
            self._stop.request(reason)
        return reason, due

    def _tell_stop(self, step: int, reason: str) -> None:
        self._emit(StoppedEvent(step=step, reason=reason, elapsed_seconds=self._clock()))
