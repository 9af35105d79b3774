"""The quickest mix of layers that fits, by arithmetic: what recomputes more takes less memory and more time.

Not all mixes are tried. Keeping less of an MLP, less of a layer, and its input on the host cost more time in this
order, and free less and less memory for it; so for each number of layers that are computed again as a whole, the
fewest MLPs and then the fewest inputs on the host are found by halving. Two things that cost much and free little come
last: an MLP in tiles makes the layers that are computed again leaner, but not one that is kept and has its backward
when the most is stored, so that it is looked at where none is kept; and layers join where no other keeps more than its
input. From the best of these it goes on to neighbours, one layer at a time, as long as there is a better one: the last
layers' backwards come before what others have to make again is there, so that they may keep a little more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from nbqlora.planner.candidate import Candidate
from nbqlora.planner.estimate import Memory
from nbqlora.planner.lean import joining_mix, lean, leanest, near, slots_of
from nbqlora.planner.limits import Limits
from nbqlora.planner.mix import Mix
from nbqlora.planner.pace import Pace

Slowness = tuple[float, float]
# Mixes from which neighbours are looked at.
STARTS = 3
# A mix that takes more than this share of what there is has no neighbour that fits.
NEARLY = 1.02


@dataclass(frozen=True, kw_only=True)
class Split:
    """One split of a step into micro-batches, with what it costs.

    Args:
        rows: of a micro-batch.
        accumulation: micro-batches of a step.
    """

    rows: int
    accumulation: int
    n_layers: int
    memory: Memory
    pace: Pace

    def candidate(self, mix: Mix) -> Candidate:
        """With these layers."""
        return Candidate(
            micro_batch_size=self.rows,
            accumulation=self.accumulation,
            mix=mix,
            memory=self.memory,
            pace=self.pace,
            twice=self.pace.twice(mix),
            budget=self.memory.budget(mix),
            host_bytes=mix.offload * self.memory.input_bytes,
            step_seconds=self.pace.seconds(mix) if self.pace.measured else None,
            loss_chunk_tokens=self.memory.loss_chunk_tokens(mix),
        )

    def worth_a_look(self, limits: Limits) -> list[Mix]:
        """The quickest that fits, and a lean one; the leanest where there is no room at all."""
        if not limits.device_bytes:
            return [leanest(self.memory, self.n_layers, limits)]
        least = lean(self.memory, self.n_layers, limits)
        if self.memory.total_bytes(least) > NEARLY * limits.device_bytes:
            return [least]
        best = self.quickest(limits)
        return [least] if best is None else list(dict.fromkeys((least, best)))

    def quickest(self, limits: Limits) -> Mix | None:
        """Of all that fit."""
        best = self._untiled(limits)
        found = [] if best is None else [best]
        for tile in self.memory.tiles:
            found += self._none_kept(limits, tile, self.slowness(best) if best is not None else None)
        known = min(map(self.slowness, found), default=None)
        # What is a layer slower may still become quicker from neighbour to neighbour.
        more = None if known is None else (known[0] + self.pace.recomputed, known[1] + 1)
        found += self._joined(limits, more)
        if any(mix.offload and mix.join for mix in found):  # where copies are slow, joining alone may be quicker
            found += self._joined(replace(limits, host_bytes=0), more)
        if not found:
            least = leanest(self.memory, self.n_layers, limits)
            found = [least] if self._fits(least, limits) else []
        climbed = [self._climb(mix, limits) for mix in sorted(found, key=self.slowness)[:STARTS]]
        return min(climbed, key=self.slowness, default=None)

    def _climb(self, mix: Mix, limits: Limits) -> Mix:
        """The quickest that is reached one layer, or one size of tiles, at a time."""
        slots = slots_of(self.memory, self.n_layers, limits)
        while True:
            quicker = [m for m in self._near(mix) if m.offload <= slots and self.slowness(m) < self.slowness(mix)]
            better = next((m for m in sorted(quicker, key=self.slowness) if self._fits(m, limits)), None)
            if better is None:
                return mix
            mix = better

    def _near(self, mix: Mix) -> Iterator[Mix]:
        yield from near(mix, self.memory)
        if mix.tile_tokens:
            yield from (mix.with_tiles(n) for n in (0, 2 * mix.tile_tokens) if not n or n in self.memory.tiles)

    def slowness(self, mix: Mix) -> Slowness:
        """What is compared: seconds, or layers that are computed twice where no rate is known."""
        seconds = self.pace.seconds(mix) if self.pace.measured else 0.0
        return round(seconds, 4), self.pace.twice(mix)

    def _untiled(self, limits: Limits) -> Mix | None:
        """The quickest with whole MLPs that joins no layers."""
        best: Mix | None = None
        for n_whole in range(self.n_layers + 1):
            if best is not None and self.slowness(self._mix(n_whole, 0, 0)) > self.slowness(best):
                break
            for mix in self._with_mlps(n_whole, limits):
                if best is None or self.slowness(mix) < self.slowness(best):
                    best = mix
        return best

    def _with_mlps(self, n_whole: int, limits: Limits) -> Iterator[Mix]:
        """The numbers of MLPs that go with so many whole layers, each with the fewest offloads."""
        most = self.n_layers - n_whole if self.memory.mlp_alone else 0
        slots = min(n_whole, slots_of(self.memory, self.n_layers, limits))
        fewest = _fewest(most, lambda n: self._fits(self._mix(n_whole, n, slots), limits))
        if fewest is None:
            return
        first = None
        for n_mlp in range(fewest, most + 1):
            if first is not None and self.slowness(self._mix(n_whole, n_mlp, 0)) > first:
                return
            offload = _fewest(slots, lambda n: self._fits(self._mix(n_whole, n_mlp, n), limits))  # noqa: B023
            assert offload is not None
            mix = self._mix(n_whole, n_mlp, offload)
            first = min(first or self.slowness(mix), self.slowness(mix))
            yield mix
            if not offload:
                return

    def _none_kept(self, limits: Limits, tile: int, known: Slowness | None) -> list[Mix]:
        """With no layer that keeps everything, and MLPs in tiles: the quickest of those that beat ``known``."""
        n, slots = self.n_layers, slots_of(self.memory, self.n_layers, limits)

        def mix(n_whole: int, offload: int) -> Mix:
            return replace(self._mix(n_whole, n - n_whole, offload), tile_tokens=tile)

        least = 0 if self.memory.mlp_alone else n
        if known is not None and self.slowness(mix(least, 0)) > known:
            return []
        fewest = _fewest(
            n - least,
            lambda more: any(self._fits(mix(least + more, k), limits) for k in _most(least + more, slots, n)),
        )
        if fewest is None:
            return []
        found: list[Mix] = []
        for n_whole in range(least + fewest, n + 1):
            if known is not None and self.slowness(mix(n_whole, 0)) > known:
                break
            fewest_of = (_fewest(k, lambda n: self._fits(mix(n_whole, n), limits)) for k in _most(n_whole, slots, n))  # noqa: B023
            offload = next((k for k in fewest_of if k is not None), None)
            if offload is not None:
                found.append(mix(n_whole, offload))
                known = min(known or self.slowness(found[-1]), self.slowness(found[-1]))
        return found

    def _joined(self, limits: Limits, known: Slowness | None) -> list[Mix]:
        """For each tile, the fewest layers that join, and with them the fewest inputs on the host.

        Args:
            known: what none needs to be looked at that is slower.
        """
        slots, n, found, n_join = slots_of(self.memory, self.n_layers, limits), self.n_layers, list[Mix](), 1
        if not self.memory.joins or n == 1 or (known is not None and self.slowness(joining_mix(n, 1, 0, 0)) > known):
            return found
        for tile in (*reversed(self.memory.tiles), 0):
            # Larger tiles take more, so that no fewer layers have to join.
            while n_join < n and not self._fits(joining_mix(n, n_join, slots, tile), limits):
                n_join += 1
                if known is not None and self.slowness(joining_mix(n, n_join, 0, 0)) > known:
                    return found
            if n_join == n:
                break
            fewest = _fewest(slots, lambda k: self._fits(joining_mix(n, n_join, k, tile), limits))  # noqa: B023
            found.append(joining_mix(n, n_join, fewest or 0, tile))
        return found

    def _mix(self, n_whole: int, n_mlp: int, offload: int) -> Mix:
        return Mix(
            keep=self.n_layers - n_whole - n_mlp, recompute_mlp=n_mlp, recompute=n_whole - offload, offload=offload
        )

    def _fits(self, mix: Mix, limits: Limits) -> bool:
        return self.memory.total_bytes(mix) <= limits.device_bytes


def _most(n_whole: int, slots: int, n_layers: int) -> tuple[int, ...]:
    """The most offloads to try; one fewer too where the last layer would be among them.

    Its backward takes more than the others', and comes with the next input from the host beside its own.
    """
    most = min(n_whole, slots)
    return (most, most - 1) if most == n_layers else (most,)


def _fewest(most: int, enough: Callable[[int], bool]) -> int | None:
    """The smallest number up to ``most`` that is enough, where more of it always is; None where none is."""
    if enough(0):
        return 0
    if not most or not enough(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
