"""Micro-batches and evaluations that outlast a shortage of memory, with no row lost or counted twice.

A micro-batch that fails in its backward has added some layers' gradients to those of the micro-batches before it. They
cannot be told apart afterwards, and a copy made before each micro-batch would be paid by every step of every run: 170
MB of an 8B model's card, or as much over PCIe, for what happens once. So nothing is copied. The micro-batches of the
step are at hand anyway (their rows are named if the loss is not finite), and where their generators stood is a few
bytes: the gradients are cleared and the step's micro-batches run again, with the same dropout. That costs at most one
step's time once, and gives the same gradients bit for bit where the arithmetic does. A failure in the forward of a
micro-batch has added nothing: only that one runs again.

Where layers' weights are split over cards, ranks gather them from each other inside a micro-batch. So whatever became
of an attempt here, behind it the rank took part in as many forwards and backwards as the others: their gathers wait for
it. They also run the same micro-batches again, all of the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from nbqlora.engine.head import IGNORED
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.sharded import shards_of
from nbqlora.train.batch import MicroBatch
from nbqlora.train.ladder import Ladder
from nbqlora.train.oom import EVAL, FORWARD, Shortage, attempt, give_back
from nbqlora.train.ranks import Ranks
from nbqlora.train.split import Batch, Collate, count_parts, in_parts, learned

T = TypeVar("T")
# A batch, or a part of one, and the learned tokens of its step -> its share of the loss; gradients are added.
RunPart = Callable[[Batch, Any], torch.Tensor]
# The same of an evaluation -> sum and number of the losses of its learned tokens.
EvalPart = Callable[[Batch], tuple[torch.Tensor, torch.Tensor]]


@dataclass
class _Place:
    """Where an attempt is, for its failure."""

    part: Batch | None = None
    clean: bool = True  # no gradient was added by this attempt

    def of(self, short: Shortage) -> Shortage:
        """The failure, with the part that was at work."""
        if self.part is None:
            return short
        return short.at(tokens=self.part["input_ids"].numel(), n_documents=len(learned(self.part)))


class Enduring:
    """Runs work until it fits.

    Args:
        loaded: its captured step is asked whether it failed.
        ladder: decides what to lower.
        run: forward and backward of a micro-batch or a part of it.
        clear: drops the step's gradients.
    """

    def __init__(self, loaded: LoadedModel, ladder: Ladder, run: RunPart, clear: Callable[[], None]) -> None:
        self._loaded, self._ladder, self._run, self._clear = loaded, ladder, run, clear
        self._ranks = Ranks(loaded.device)

    def train(self, batch: MicroBatch, done: Sequence[MicroBatch], collate: Collate) -> int:
        """Add a micro-batch's gradients, and fill in its loss.

        Args:
            done: the step's micro-batches so far.
            collate: makes a part of documents.

        Returns:
            How often memory ran out, on any rank.

        Raises:
            MemoryExhaustedError: it does not fit, whatever is lowered.
        """
        tried, again = 0, False
        while True:
            place = _Place()
            work = partial(self._in_parts, batch, collate, place)
            if tried:
                work = partial(self._again, batch, done if again else None, collate, place)
            of = [one.inputs for one in (*(done if again else ()), batch)]
            found = self._attempt(work, of, self._ladder.footing.part_tokens)
            mine = None
            if isinstance(found, Shortage):
                mine = place.of(found).at(capturing=self._loaded.micro_step().broke_off_capture)
            short = self._ranks.agree(mine)
            if short is None:
                assert isinstance(found, torch.Tensor)
                batch.loss = found
                self._ladder.passed()
                return tried
            # Where only another rank failed, this one's gradients are complete, and once too many.
            again = again or self._splits or mine is None or mine.phase != FORWARD or not place.clean
            self._ladder.climb_down(short, tried=tried)
            tried += 1

    def evaluate(self, batch: Batch, run: EvalPart, collate: Collate) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Sum and number of each part's losses.

        Raises:
            MemoryExhaustedError: it does not fit, whatever is lowered.
        """
        tried = 0
        while True:
            place = _Place()
            work, limit = partial(self._evaluated, batch, run, collate, place), self._ladder.footing.eval_part_tokens
            found = self._attempt(work, [batch], limit, phase=EVAL)
            short = self._ranks.agree(place.of(found) if isinstance(found, Shortage) else None)
            if short is None:
                assert not isinstance(found, Shortage)
                self._ladder.passed()
                return found
            self._ladder.climb_down(short, tried=tried)
            tried += 1

    def lower(self, short: Shortage | None) -> bool:
        """Before memory runs out: all ranks a rung lower where any was short; False where none was, or none is left."""
        found = self._ranks.agree(short)
        return found is not None and self._ladder.lower(found)

    @property
    def _device(self) -> torch.device:
        return self._loaded.device

    @property
    def _splits(self) -> bool:
        """Whether ranks gather weights from each other inside a micro-batch."""
        return shards_of(self._loaded.model) is not None

    def _attempt(
        self, work: Callable[[], T], batches: Sequence[Batch], part_tokens: int, *, phase: str = ""
    ) -> T | Shortage:
        """As :func:`attempt`; behind it this rank took part in all that the others gather.

        Args:
            batches: that the work runs, each in parts of so many tokens.
        """
        shards = shards_of(self._loaded.model)
        if shards is None:
            return attempt(work, self._device, phase=phase)
        passes = shards.passes + self._ranks.most(sum(count_parts(batch, part_tokens) for batch in batches))
        found = attempt(work, self._device, phase=phase)
        catch_up = partial(shards.catch_up, passes, trains=phase != EVAL)
        if isinstance(attempt(catch_up, self._device, phase=phase), Shortage):
            give_back(self._device)
            catch_up()
        return found

    def _again(
        self, batch: MicroBatch, done: Sequence[MicroBatch] | None, collate: Collate, place: _Place
    ) -> torch.Tensor:
        """The batch's loss, with the dropout that it had; ``done``, if given, runs before it, on cleared gradients."""
        if done is not None:
            place.clean = False
            self._clear()
        for one in [*(done or ()), batch]:
            one.random.put_back(self._device)
            loss = self._in_parts(one, collate, place)
        return loss

    def _in_parts(self, batch: MicroBatch, collate: Collate, place: _Place) -> torch.Tensor:
        losses, count = [], batch.count
        parts = in_parts(batch.inputs, self._ladder.footing.part_tokens, collate)
        if count is None and len(parts) > 1:  # a mean over this micro-batch alone, which its parts share
            count = (batch.inputs["labels"][:, 1:] != IGNORED).sum()
        for part in parts:
            place.part = part
            losses.append(self._run(part, count))
            place.clean = False
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _evaluated(
        self, batch: Batch, run: EvalPart, collate: Collate, place: _Place
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        found = []
        for part in in_parts(batch, self._ladder.footing.eval_part_tokens, collate):
            place.part = part
            found.append(run(part))
        return found
