"""What processes that train together tell each other; nothing where a process trains alone.

Each rank has the whole model and its share of a step's rows. The gradients of the adapters are added once a step; what
decides how a run goes on is agreed on, so that no rank waits in a collective for one that went elsewhere: memory that
ran out (a rank that lowers its rung by itself would do other work), a stop, a checkpoint that is due, a loss that is
not finite. These are a few numbers from host to host, and no card is waited for: where cards train, the group has NCCL
for their tensors and gloo for the host's.

Whoever waits for a rank that has gone is told so, as soon as the backend knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from nbqlora.core.errors import LostRankError, RunError
from nbqlora.core.ranks import Rank
from nbqlora.train.oom import Shortage, out_of_memory
from nbqlora.train.stop import INTERRUPTED, TERMINATED, TIME_IS_UP

PHASES = ("forward", "backward", "optimizer", "eval", "probe")
ANOTHER = "another rank was asked to stop"
REASONS = ("", ANOTHER, TIME_IS_UP, TERMINATED, INTERRUPTED)
# Numbers that one agreement carries.
CARRIED = 7
T = TypeVar("T")


class Ranks:
    """The processes that train together.

    Args:
        device: of this process; it takes the host's numbers where the group has a backend for cards alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self.number, self.n = (dist.get_rank(), dist.get_world_size()) if self._together else (0, 1)
        on_card = self._together and "cpu:" not in dist.get_backend_config()
        self._device = device if on_card else torch.device("cpu")
        if self._together:  # made while there is room
            self._told = torch.zeros(CARRIED, dtype=torch.int64, device=self._device)

    @property
    def alone(self) -> bool:
        """There is no other."""
        return not self._together

    @property
    def first(self) -> bool:
        """This one writes the files."""
        return self.number == 0

    def agree(self, mine: Shortage | None) -> Shortage | None:
        """What was short on any rank, the largest of each figure; the same on all. None where all is well."""
        if not self._together:
            return mine
        failed, phase, asked, on_host, capturing, tokens, n_documents = self._largest(_numbers(mine))
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

    def agree_to_stop(self, reason: str, *here: bool) -> tuple[str, tuple[bool, ...]]:
        """Why all end after this step, "" to go on; and of whatever else is asked whether it is so on any rank."""
        if not self._together:
            return reason, here
        code = REASONS.index(reason if reason in REASONS else ANOTHER)
        agreed, *anywhere = self._largest([code, *here])
        told = tuple(bool(number) for number in anywhere[: len(here)])
        return reason if agreed == code else REASONS[agreed], told

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._largest([here])[0]) if self._together else here

    def most(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        return self._largest([number])[0] if self._together else number

    def total(self, *numbers: float) -> tuple[float, ...]:
        """The sum of each over all ranks, fp64."""
        if not self._together:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        self._asked(lambda: dist.all_reduce(tensor))
        return tuple(tensor.tolist())

    def add_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Add the tensors of all ranks, in place and where they are; nothing waits for a card."""
        if self._together:
            self._asked(lambda: dist.all_reduce(tensor))
        return tensor

    def take_firsts_(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite with what the first rank has."""
        for tensor in tensors if self._together else ():
            self._asked(partial(dist.broadcast, tensor, src=0))

    def firsts(self, numbers: list[int]) -> list[int]:
        """As many numbers, as the first rank has them."""
        if not self._together:
            return numbers
        tensor = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        self._asked(lambda: dist.broadcast(tensor, src=0))
        found: list[int] = tensor.tolist()
        return found

    def gathered(self, mine: T) -> list[T]:
        """What each rank has, in their order."""
        if not self._together:
            return [mine]
        found: list[Any] = [None] * self.n
        self._asked(lambda: dist.all_gather_object(found, mine))
        return found

    def all_well(self, work: Callable[[], T]) -> T:
        """Do what each rank does for itself; where one fails all do, and say which.

        Raises:
            RunError: it failed on another rank.
        """
        if not self._together:
            return work()
        error: Exception | None = None
        try:
            result = work()
        except Exception as found:
            error = found
        said = self.gathered("" if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        failed = [(number, text) for number, text in enumerate(said) if text]
        if failed:
            raise RunError(f"rank {failed[0][0]} of {self.n} cannot go on: {failed[0][1]}")
        return result

    def from_first(self, work: Callable[[], T]) -> T:
        """What the first rank's work gives, on all; the others wait for it.

        Raises:
            RunError: it failed there.
        """
        result = self.all_well(lambda: work() if self.first else None)
        return self.gathered(result)[0]  # type: ignore[return-value]

    def _asked(self, ask: Callable[[], object]) -> None:
        """Take part in something of all ranks. Raises :class:`LostRankError`: one of them is gone."""
        try:
            ask()
        except RuntimeError as error:
            if out_of_memory(error) is not None:
                raise
            first = str(error).partition("\n")[0]
            message = f"rank {self.number} of {self.n} has lost another one, which ended or cannot be reached: {first}"
            raise LostRankError(message) from error

    def _largest(self, numbers: Sequence[int]) -> list[int]:
        self._told.copy_(torch.tensor([*numbers, *[0] * (CARRIED - len(numbers))], dtype=torch.int64))
        self._asked(lambda: dist.all_reduce(self._told, op=dist.ReduceOp.MAX))
        found: list[int] = self._told.tolist()
        return found


def rank_in(ranks: Ranks, rank: Rank) -> Rank:
    """What the environment said; where it said nothing and there is a group, what that says."""
    return rank if ranks.alone or not rank.alone else Rank(number=ranks.number, n=ranks.n, n_local=ranks.n)


def _numbers(short: Shortage | None) -> list[int]:
    if short is None:
        return [0]
    figures = (short.asked_bytes or 0, short.on_host, short.capturing, short.tokens, short.n_documents)
    return [1, PHASES.index(short.phase), *map(int, figures)]
