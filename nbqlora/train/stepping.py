"""The optimizer's step, where memory is short: done again where that changes nothing, else the end, on all ranks alike.

A step must not stop half way, so what it allocates is made before: its states before step 1, and, for the one that
needs temporary tensors, those just before the step, to lie in the allocator's cache. What then still fails fails before
the step began, and a rank does it again without asking the others: nothing was written.

Where that does not help on one rank, the others have taken the step, and it cannot be done again together: they would
add the same gradients to moments that hold them already. So the run ends, on all at the same place. The short rank goes
on, without a step of its own, to what ranks agree on behind each step anyway, so this costs nothing. If the first
rank took the step, it is told and saved, checkpoint and all, and nothing is lost. If not, all end at once: with the
adapter of the step before, or with the last checkpoint if this one was cut in two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nbqlora.core.errors import MemoryExhaustedError
from nbqlora.train.ladder import Ladder
from nbqlora.train.oom import OPTIMIZER, Shortage, attempt
from nbqlora.train.ranks import Ranks

CUT_IN_TWO = "memory ran out in the middle of the optimizer's step, which cannot be taken back"
T = TypeVar("T")


class Stepping:
    """Runs the work between a step's last backward and the next step's first forward.

    Args:
        ladder: gives memory back, and says so.
    """

    def __init__(self, device: torch.device, ladder: Ladder) -> None:
        self._device, self._ladder, self._ranks = device, ladder, Ranks(device)
        # Memory was given back here since ranks agreed last.
        self._gave_back = False
        # What this rank's part of a step ended with, and what all ranks end with.
        self._ended: MemoryExhaustedError | None = None
        self._end: MemoryExhaustedError | None = None
        self._reason = ""

    def once(self, work: Callable[[], T], *, is_whole: Callable[[], bool] = lambda: True) -> T:
        """Work that can be done again from its beginning; memory can only be given back for it.

        Args:
            is_whole: whether a failure left everything as it was.

        Raises:
            MemoryExhaustedError: it does not fit, or failed in the middle of something.
        """
        tried = 0
        while True:
            found = attempt(work, self._device, phase=OPTIMIZER)
            if not isinstance(found, Shortage):
                return found
            if not is_whole():
                raise MemoryExhaustedError(CUT_IN_TWO, adapter_is_whole=False)
            self._ladder.climb_down(found, tried=tried)
            self._gave_back = True
            tried += 1

    def in_step(self, work: Callable[[], T], *, is_whole: Callable[[], bool] = lambda: True) -> T | None:
        """:meth:`once`, in a step of all ranks: None where it does not fit on this one, and for all that follows.

        The others hear of it in :meth:`agree_to_stop`; until then this one takes part in what they wait for.

        Raises:
            MemoryExhaustedError: as :meth:`once`, where there are no others.
        """
        if self._ended is not None:
            return None
        try:
            return self.once(work, is_whole=is_whole)
        except MemoryExhaustedError as error:
            if self._ranks.alone:
                raise
            self._ended = error.with_traceback(None)
            return None

    def agree_to_stop(self, reason: str, due: bool = False) -> tuple[str, bool]:
        """Why all ranks end here, "" to go on, and whether a checkpoint is due: behind each step, and when asked.

        Returns:
            Memory that ran out on another rank as the reason, where the first one has taken the step: it is saved
            before :meth:`check_end` raises.

        Raises:
            MemoryExhaustedError: the first rank's step was not taken; on all of them.
        """
        short = self._ended is not None
        reason, (due, gave_back, ended) = self._ranks.agree_to_stop(reason, due, self._gave_back, short)
        self._gave_back = False
        if gave_back:
            self._ladder.gave_back()
        if ended and self._end is None:
            self._end, rank = self._end_of_all()
            if rank == 0:
                raise self._end
            self._reason = f"memory ran out on rank {rank}"
        return (reason, due) if self._end is None else (self._reason, True)

    def check_end(self) -> None:
        """When what the first rank has is saved.

        Raises:
            MemoryExhaustedError: a step did not fit on another rank; on all of them.
        """
        if self._end is not None:
            raise self._end

    def _end_of_all(self) -> tuple[MemoryExhaustedError, int]:
        """Of the ranks that ended the first, and what it ended with, the same on all."""
        mine = self._ended
        ends = self._ranks.gathered(mine and (str(mine), mine.room_bytes, mine.adapter_is_whole))
        rank, (text, room, is_whole) = next((rank, end) for rank, end in enumerate(ends) if end)
        said = f"rank {rank} of {self._ranks.n}: {text}"
        # The first one writes, and where it did not end it has the whole step.
        return MemoryExhaustedError(said, room_bytes=room, adapter_is_whole=is_whole or rank > 0), rank
