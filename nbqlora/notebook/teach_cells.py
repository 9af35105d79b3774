"""What happens around each cell of a lesson: seeds before it, and its time after it.

The time is that on the clock, or the processor time where that is less: on a machine that others use too, their share
is not the cell's.
"""

from __future__ import annotations

import random
import sys
from time import monotonic, process_time
from typing import Any


class Cells:
    """Hooks on a shell's cells; one for each shell, however many lessons are made.

    Args:
        shell: whose cells.
    """

    def __init__(self, shell: Any) -> None:
        self.longest_seconds = 0.0
        self._seed, self._began = 0, (monotonic(), process_time())
        shell.events.register("pre_run_cell", self._before)
        shell.events.register("post_run_cell", self._after)

    def begin(self, seed: int) -> None:
        """A lesson begins, in the middle of the cell that makes it."""
        self._seed, self.longest_seconds = seed, 0.0
        set_seeds(seed)

    def _before(self, *_: Any) -> None:
        self._began = monotonic(), process_time()
        set_seeds(self._seed)

    def _after(self, *_: Any) -> None:
        clock, processor = self._began
        taken = min(monotonic() - clock, process_time() - processor)
        self.longest_seconds = max(self.longest_seconds, taken)


def set_seeds(seed: int) -> None:
    """Seed whatever draws here; nothing is imported for it, and CUDA is not started."""
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
