"""What several cards would do about a model that does not fit: those that are idle, or more of the same kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import format_bytes
from nbqlora.planner.advice import least_of, longest_that_fits
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.cards import Cards, shared
from nbqlora.planner.embedding import limits_for
from nbqlora.planner.limits import limits_of
from nbqlora.planner.shards import shards_of
from nbqlora.planner.split import WHOLE, not_split_because, ways

# More are not looked at.
MOST_CARDS = 64
# Ranks below it are not proposed.
LEAST_RANK = 4
# Those that LoRA began with.
FEW_LINEARS = ("q_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class Misfit:
    """What did not fit.

    Args:
        config: as it was asked for, with ``gpus`` as a number.
        device: one of the cards, with its whole machine's memory.
        cards: what was to train together, ``gpus`` of them in all.
    """

    config: FinetuneConfig
    model: ModelSpec
    device: DeviceSpec
    data: DataStats
    dtype: str
    cards: Cards

    def lines(self) -> list[str]:
        """What several cards would do; none where there is one only."""
        if self.cards.n == 1:
            return [self._with_idle_cards()] if self.device.n_devices > 1 else []
        if self.device.kind == "cpu" and self.cards.per_node > 1:
            return [f"{self.cards.per_node} processes share the machine's memory: fewer would have more of it each"]
        if self.config.fsdp is False:
            return ["fsdp = false keeps the whole model on each card"]
        if problem := not_split_because(self.config, self.model):
            return [f"each card needs the whole model here: {_why(problem)}"]
        return self._what_would_do()

    def _with_idle_cards(self) -> str:
        """The fewest of the machine's cards that would do, else what all of them would."""
        most = self.device.n_devices
        for n in range(2, most + 1):
            if self._fits(Cards(per_node=n)):
                return f"gpus = {n} {self._how(n)}: it fits with max_length = {self.config.max_length}"
        config = replace(self.config, gpus=most)
        if problem := not_split_because(config, self.model):
            return f"gpus = {most} would not do: {_why(problem)}"
        machine = shared(self.device, Cards(per_node=most))
        limit = limits_of(config, machine).device_bytes
        tokens, _ = longest_that_fits(config, self.model, machine, self.data, self.dtype, limit)
        if tokens:
            return f"gpus = {most} {self._how(most)}: it fits with max_length = {tokens}"
        needed = format_bytes(self._least(config, Cards(per_node=most)).budget.total_bytes)
        return f"gpus = {most} {self._how(most)}, and {needed} would be needed on each"

    def _how(self, n: int) -> str:
        of = "both" if n == self.device.n_devices == 2 else f"all {n}" if n == self.device.n_devices else f"{n} of them"
        config = replace(self.config, gpus=n)
        split = shards_of(ways(config, self.model)[-1]) > 1
        return f"splits the weights over {of}" if split else f"gives each of {of} fewer rows"

    def _what_would_do(self) -> list[str]:
        """A smaller adapter, or more cards, with everything else as it was asked for."""
        smaller, wider = _smaller(self.config, self.model), list(self._wider())
        less = next((f"with {words}" for words, config in smaller if self._fits(self.cards, config)), "")
        # One after the other: a batch that was asked for can be made on some numbers of cards only.
        more = next((words for words, cards in wider if self._fits(cards)), "")
        if would := ", or ".join(filter(None, [less, more])):
            return [f"it would fit {would}"]
        what = "cards" if self.cards.n_nodes == 1 else "machines"
        return [f"no number of such {what} would do, up to {MOST_CARDS} cards"] if wider else []

    def _wider(self) -> Iterator[tuple[str, Cards]]:
        """More cards of a machine; of several machines what each has, then more machines."""
        per_node, n_nodes = self.cards.per_node, self.cards.n_nodes
        if n_nodes == 1:
            for n in range(per_node + 1, MOST_CARDS + 1):
                yield f"split over {n} such cards", Cards(per_node=n)
            return
        for n in range(per_node + 1, self.device.n_devices + 1):
            yield f"with gpus = {n}", Cards(per_node=n, n_nodes=n_nodes)
        for m in range(n_nodes + 1, MOST_CARDS // per_node + 1):
            yield f"split over {m} such machines", Cards(per_node=per_node, n_nodes=m)

    def _fits(self, cards: Cards, config: FinetuneConfig | None = None) -> bool:
        """Whether these cards would do."""
        try:
            config = replace(config or self.config, gpus=cards.n)
        except ConfigError:  # what was asked for does not make the batch on so many
            return False
        limits = limits_for(config, self.model, shared(self.device, cards), self.dtype)
        return limits.fit(self._least(config, cards))

    def _least(self, config: FinetuneConfig, cards: Cards) -> Candidate:
        return least_of(config, self.model, shared(self.device, cards), self.data, self.dtype)


def _why(problem: Problem) -> str:
    """With what to do, unless that is to leave out an option that is not there."""
    return problem.message if problem.hint == WHOLE else f"{problem.message}; {problem.hint}"


def _smaller(config: FinetuneConfig, model: ModelSpec) -> Iterator[tuple[str, FinetuneConfig]]:
    """Adapters that take less: states in a byte each, lower ranks, fewer linears; then two of these."""
    ranks = [r for r in (config.lora_r >> n for n in range(1, config.lora_r.bit_length())) if r >= LEAST_RANK]
    less = [(f"lora_r = {r}", replace(config, lora_r=r)) for r in ranks]
    if config.target_modules == "all-linear" and model.linear_shapes.keys() >= set(FEW_LINEARS):
        names = ", ".join(f'"{name}"' for name in FEW_LINEARS)
        less.append((f"target_modules = [{names}]", replace(config, target_modules=FEW_LINEARS)))
    can_be_eight = config.optim != "adamw_8bit"
    if can_be_eight:
        yield 'optim = "adamw_8bit"', replace(config, optim="adamw_8bit")
    for words, smaller in less:
        yield words, smaller
    for words, smaller in less if can_be_eight else []:
        yield f'optim = "adamw_8bit" and {words}', replace(smaller, optim="adamw_8bit")
