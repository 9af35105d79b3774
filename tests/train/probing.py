"""A trainer that probes on a CPU too, with figures that a test chooses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from nbqlora.run.probing import ProbeCallback
from tests.train.parts import Parts, parts


class Measured:
    """Stands for the profile: does the work, counts how often, and tells the peaks that were asked for, then 0."""

    def __init__(self, *peaks: int) -> None:
        self.peaks, self.phases = list(peaks), []

    def __call__(self, phase: str, work: Callable[[], None]) -> int:
        self.phases.append(phase)
        work()
        return self.peaks.pop(0) if self.peaks else 0


def add_probe(made: Parts, told: list[str], measured: Measured | None = None) -> None:
    """As a run does it on a card."""
    made.trainer.add_callback(ProbeCallback(made.trainer, made.loaded, measured or Measured(), told.append))


def probed(model: Path, data: Any, out: Path, measured: Measured | None = None, **changes: Any) -> tuple[Parts, list]:
    """As :func:`parts`, with a probe step; and what it told."""
    made, told = parts(model, data, out, **changes), []
    add_probe(made, told, measured)
    return made, told
