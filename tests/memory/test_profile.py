"""Memory by phase and by holder: what a boundary sees, what it costs, and what is left afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import timeit
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from nbqlora.core.memory_profile import MemoryProfile
from nbqlora.core.specs import MemoryCategory as M
from nbqlora.memory.peak import PeakMeter, highest_before_resets
from nbqlora.memory.profile import MAX_SAMPLES, Profile, latest

MIB = 1 << 20


def peaks(profile: MemoryProfile) -> dict[str, int]:
    return {p.phase: p.peak_bytes for p in profile.phases}


def test_phases_on_a_cpu_see_their_own_memory() -> None:
    # In a process of its own: what this one freed earlier would be handed out again, and never rise.
    code = """
import time
from nbqlora.memory.profile import Profile
MIB = 1 << 20
profile = Profile("cpu")
with profile:
    profile.enter("forward")
    kept = bytearray(b"x") * (64 * MIB)
    profile.enter("backward")
    gone = bytearray(b"x") * (128 * MIB)
    time.sleep(0.2)  # long enough to be sampled
    del gone
    profile.enter("optimizer")
    with profile.within("save"):
        assert profile.phase == "save"
    assert profile.phase == "optimizer"
    del kept
found = {p.phase: p for p in profile.snapshot().phases}
assert list(found) == ["load", "forward", "backward", "optimizer", "save"], list(found)
start = found["load"].after_bytes
rises = [round((found[p].peak_bytes - start) / MIB / 64) for p in ("forward", "backward", "optimizer")]
assert rises == [1, 3, 1], rises
assert abs(found["optimizer"].after_bytes - start) < 16 * MIB
assert profile.snapshot().highest.phase == "backward"
assert profile.read() >= found["backward"].peak_bytes
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


class FakeCuda:
    """The figures of a card that torch would keep."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self.memory = SimpleNamespace(memory_stats_as_nested_dict=self.stats)

    def stats(self) -> dict[str, Any]:
        return {"allocated_bytes": {"all": {"peak": self.peak, "current": self.now}}}

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.now

    def hold(self, n: int) -> None:
        self.now = n
        self.peak = max(self.peak, n)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr("nbqlora.memory.peak._before_resets", 0)
    return fake


def test_phases_on_a_card_are_exact_and_shared_with_other_meters(card: FakeCuda) -> None:
    around, profile = PeakMeter("cuda"), Profile("cuda")
    card.hold(5)
    around.start()
    with profile:
        card.hold(30)
        card.hold(20)
        profile.enter("step")
        card.hold(90)
        card.hold(25)
        profile.enter("optimizer")
        card.hold(27)
        assert profile.read() == 90
        assert peaks(profile.snapshot()) == {"load": 30, "step": 90, "optimizer": 27}
        profile.start("load")  # a new stretch: what was before is not its peak
        assert profile.read() == 27
    assert (around.read(), highest_before_resets()) == (90, 90)
    assert [p.after_bytes for p in profile.snapshot().phases] == [27, 25, 27]


def test_what_the_counted_holders_leave_are_activations(card: FakeCuda) -> None:
    profile = Profile("cuda")
    owner: Any = FakeCuda()
    with profile:
        profile.hold(owner, {M.WEIGHTS: 50, M.ADAPTER: 4})
        profile.enter("step")
        card.hold(100)
        profile.hold(owner, {M.WEIGHTS: 50, M.ADAPTER: 4, M.OPTIMIZER: 8})
        profile.hold(owner, {M.WEIGHTS: 50, M.ADAPTER: 4})
        assert profile.holdings() == {M.WEIGHTS: 50, M.ADAPTER: 4}
    held = profile.snapshot().by_category
    assert held == {M.WEIGHTS: 50, M.ADAPTER: 4, M.OPTIMIZER: 8, M.ACTIVATIONS: 38}
    assert sum(held.values()) == profile.snapshot().highest.peak_bytes  # type: ignore[union-attr]
    del owner
    gc.collect()
    assert profile.holdings() == {}


def test_nothing_of_training_was_measured() -> None:
    with Profile("cpu") as profile:
        pass
    found = profile.snapshot()
    assert (found.highest, found.by_category) == (None, {})


def test_a_long_run_keeps_few_samples_and_every_peak(card: FakeCuda) -> None:
    seconds = [0.0]
    profile = Profile("cuda", clock=lambda: seconds[0])
    with profile:
        for step in range(20_000):
            seconds[0] += 0.3
            card.hold(step % 7919)
            profile.enter("step" if step % 2 else "optimizer")
    samples = profile.snapshot().samples
    assert len(samples) <= MAX_SAMPLES
    assert max(s.peak_bytes for s in samples) == 7918
    assert [s.elapsed_seconds for s in samples] == sorted(s.elapsed_seconds for s in samples)
    assert samples[-1].elapsed_seconds == pytest.approx(6000.0)


def test_the_latest_profile_is_known_while_it_lives() -> None:
    profile = Profile("cpu")
    with profile:
        assert latest() is profile
    del profile
    gc.collect()
    assert latest() is None


def test_an_error_ends_it_and_its_thread() -> None:
    profile = Profile("cpu")
    with pytest.raises(LookupError), profile:
        raise LookupError
    assert profile.phase == ""
    assert not [t for t in threading.enumerate() if t.name == "nbqlora-peak"]
    profile.enter("forward")
    assert profile.phase == "", "outside a stretch nothing is entered"


def test_a_boundary_costs_microseconds() -> None:
    """Three of them in a step of 10 ms, the shortest of a tiny model, may take 1 %: 33 us each."""
    with Profile("cpu") as profile:
        boundary: Callable[[], None] = lambda: (profile.enter("forward"), profile.enter("backward"))[0]  # noqa: E731
        assert min(timeit.repeat(boundary, number=500, repeat=5)) / 1000 < 33e-6
