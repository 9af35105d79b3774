"""A line that says how far a long save is, and how long it will still take.

tqdm's own, in text: it needs no widget, and reads the same in a notebook, a shell and a log.
"""

from __future__ import annotations

import os
import sys

from tqdm import tqdm

from nbqlora.core.display import is_static
from nbqlora.hub.merge import Progress


def bar(stage: str) -> Progress:
    """Draws a stage's progress, at most once a second; nothing where output must not change."""
    drawn: list[tqdm[None]] = []

    def show(done: int, total: int) -> None:
        if not drawn:
            drawn.append(
                tqdm(desc=stage, total=total, unit="B", unit_scale=True, mininterval=1.0, file=sys.stdout,
                     disable=is_static(os.environ), leave=False)
            )  # fmt: skip
        drawn[0].update(done - drawn[0].n)
        if done >= total:
            drawn[0].close()

    return show
