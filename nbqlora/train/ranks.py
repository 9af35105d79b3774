"""Several processes that train together stand on the same rung.

A rank that ran out of memory cannot be left behind: the others would wait for it in the all-reduce of the gradients
for ever. So before that, after each micro-batch, the ranks tell each other whether all is well, and what was short
where; each then knows the same shortage, lowers the same, and runs the micro-batch again, the ones that had room for it
too. It is one all-reduce of a few integers; nothing where a process trains alone.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from nbqlora.train.oom import Shortage

PHASES = ("forward", "backward", "optimizer", "eval")


class Ranks:
    """The processes that train together.

    Args:
        device: of this process, whose collectives NCCL runs there.
    """

    def __init__(self, device: torch.device) -> None:
        self._together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if self._together:
            on_card = dist.get_backend() == "nccl"
            # Made while there is room.
            self._told = torch.zeros(7, dtype=torch.int64, device=device if on_card else "cpu")

    def agree(self, mine: Shortage | None) -> Shortage | None:
        """What was short on any rank, the largest of each figure; the same on all. None where all is well."""
        if not self._together:
            return mine
        self._told.copy_(torch.tensor(_numbers(mine), dtype=torch.int64))
        dist.all_reduce(self._told, op=dist.ReduceOp.MAX)
        failed, phase, asked, on_host, capturing, tokens, n_documents = self._told.tolist()
        if not failed:
            return None
        return Shortage(
            phase=PHASES[phase],
            asked_bytes=asked or None,
            on_host=bool(on_host),
            capturing=bool(capturing),
            tokens=tokens,
            n_documents=n_documents,
        )


def _numbers(short: Shortage | None) -> list[int]:
    if short is None:
        return [0] * 7
    figures = (short.asked_bytes or 0, short.on_host, short.capturing, short.tokens, short.n_documents)
    return [1, PHASES.index(short.phase), *map(int, figures)]
