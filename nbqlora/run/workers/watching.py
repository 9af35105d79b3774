"""Workers at work: their events, the user's interrupts, and their end.

Events are rank 0's, its peak that of the fullest card; of the other ranks an out-of-memory that rank 0 did not tell.
One that ends badly ends all: the others wait for it in a collective, where torch's gloo raises and NCCL hangs. So they
get some seconds to raise, or to write what they were writing, and are killed then; files are exchanged as wholes, so
the last checkpoint is one. A worker's own error, told by itself, says more than what its end did to the others.
"""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from time import monotonic

from nbqlora.core.errors import InterruptedRunError, LostRankError, NbqloraError, RunError, TrainingError
from nbqlora.core.events import Event, Observer, OomEvent, PhaseEvent, SavedEvent, StepEvent
from nbqlora.core.report import Report
from nbqlora.run.workers.lines import Done, Failed, Told
from nbqlora.run.workers.starting import Worker, Workers
from nbqlora.run.workers.worker import BEFORE_TRAINING
from nbqlora.train.stop import TERMINATED, Stop

TICK_SECONDS = 0.2
# From the last word of any worker on, after one has ended badly.
GRACE_SECONDS = 5.0
# Between two looks at what rank 0 prints, such as a download's bar.
BAR_SECONDS = 5.0
# After an interrupt rank 0 may still have to save an adapter; where it has begun to, the folder may be a slow one.
INTERRUPTED_SECONDS, SAVING_SECONDS = 20.0, 180.0


@dataclass(frozen=True, kw_only=True)
class Died:
    """A worker that ended without a word.

    Args:
        status: as ``subprocess`` has it: a signal's number is negative.
    """

    status: int
    last_words: str


End = Done | Failed | Died


class Watch:
    """Hears workers until the last one is over.

    Args:
        observe: takes each event.
        say: takes a line of progress.
        how: what the user writes to resume, for messages.
    """

    def __init__(self, workers: Workers, observe: Observer, say: Callable[[str], None], how: str) -> None:
        self._workers, self._observe, self._say, self._how = workers, observe, say, how
        self._stop = Stop(on_request=self._first_interrupt)
        self._interrupts = 0
        self._ends: dict[int, End] = {}
        self._heard = monotonic()
        self._lines: dict[Connection, Worker] = {worker.line: worker for worker in workers.all}
        self.peaks: dict[int, int] = {}
        self._ooms: set[tuple[int, str, str]] = set()
        self._saved, self._total = 0, 0
        # Rank 0 writes an adapter now.
        self._saves = False
        self._looked, self._bar = monotonic(), ""

    def reports(self) -> list[Report]:
        """Every worker's report, by rank, when all have ended well.

        Raises:
            NbqloraError: why they did not; none of them trains any more then.
            KeyboardInterrupt: a third interrupt; they may still be there.
        """
        with self._stop:
            while not self._over():
                self._stop.hold()
                for line in wait(list(self._lines), TICK_SECONDS):
                    assert isinstance(line, Connection)
                    self._hear(line)
                self._bury()
                self._say_bar()
                self._let_interrupts_through()
            done = [end for _, end in sorted(self._ends.items()) if isinstance(end, Done)]
            if len(done) == len(self._workers.all):
                self._workers.wait()
                return [end.report for end in done]
        raise self._cause()

    def _hear(self, line: Connection) -> None:
        rank = self._lines[line].rank
        try:
            told = line.recv()
        except (EOFError, OSError):
            del self._lines[line]
            return
        self._heard = monotonic()
        if isinstance(told, Told):
            self._tell(rank, told.event)
        elif isinstance(told, Done | Failed):
            self._ends[rank] = told

    def _bury(self) -> None:
        """Find those that died; what a dead one said before was heard first."""
        for each in self._workers.all:
            if each.rank in self._ends or (each.line in self._lines and each.line.poll()):
                continue
            with_line = each.line in self._lines
            try:
                status = each.process.wait(0 if with_line else TICK_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            each.kill()  # what it had started
            self._ends[each.rank] = Died(status=status, last_words=each.last_words())
            self._heard = monotonic()

    def _tell(self, rank: int, event: Event) -> None:
        if isinstance(event, StepEvent):
            self.peaks[rank] = max(event.peak_bytes, self.peaks.get(rank, 0))
            event = replace(event, peak_bytes=max(self.peaks.values()))
            if not self._total:  # the first step of a run that goes on stands behind a checkpoint
                self._saved = max(self._saved, event.step - 1)
            self._total = event.total_steps
        if isinstance(event, OomEvent):
            met = (event.step, event.phase, event.action)
            if met not in self._ooms:
                self._ooms.add(met)
                self._observe(event)
        elif rank == 0:
            if isinstance(event, SavedEvent):
                self._saved, self._saves = event.step, False
            elif isinstance(event, PhaseEvent):
                self._saves = event.phase == "save"
            self._observe(event)

    def _say_bar(self) -> None:
        """Before the first step, the bar that a library draws in rank 0: how far a download is."""
        if self._total or monotonic() - self._looked < BAR_SECONDS:
            return
        self._looked = monotonic()
        words = self._workers.all[0].last_words(1).rpartition("\r")[2]
        if "%|" in words and words != self._bar:
            self._bar = words
            self._say(words)

    def _over(self) -> bool:
        if len(self._ends) == len(self._workers.all):
            return True
        bad = [end for end in self._ends.values() if not isinstance(end, Done)]
        interrupted = any(isinstance(end, Failed) and isinstance(end.error, InterruptedRunError) for end in bad)
        saves = self._saves and 0 not in self._ends
        patience = SAVING_SECONDS if saves else INTERRUPTED_SECONDS if interrupted else GRACE_SECONDS
        return bool(bad) and monotonic() - self._heard > patience

    def _first_interrupt(self) -> None:
        number = signal.SIGTERM if self._stop.reason == TERMINATED else signal.SIGINT
        self._workers.interrupt(number)

    def _let_interrupts_through(self) -> None:
        """Hand a further interrupt on, which had to wait so that it cuts no message in two; raise a third."""
        try:
            self._stop.release()
        except KeyboardInterrupt:
            self._interrupts += 1
            if self._interrupts > 1:
                raise
            self._workers.interrupt(signal.SIGINT)

    def _cause(self) -> NbqloraError:
        """Of all ends the one that led to the others."""
        rank, end = min(self._ends.items(), key=_nearness)
        name = f"rank {rank} of {len(self._workers.all)}"
        if isinstance(end, Died):
            if end.status == -signal.SIGTERM and self._stop.reason:  # it was importing still, or loading
                return InterruptedRunError(BEFORE_TRAINING)
            return TrainingError(f"{name} {_death(end)}\n  all processes of this run were ended{self._hint()}")
        assert isinstance(end, Failed)
        if end.error is None:
            error = TrainingError(f"{name} failed: {end.text}\n  all processes of this run were ended{self._hint()}")
            error.add_note(end.trace)
            return error
        return end.error if rank == 0 else _named(end.error, name)

    def _hint(self) -> str:
        if not 0 < self._saved < self._total:
            return ""
        return f"\n  {self._how} to go on after step {self._saved} of {self._total}"


def _nearness(item: tuple[int, End]) -> tuple[int, int]:
    """Smallest for the end that is most likely the cause; of the same kind the lowest rank, which writes the files."""
    rank, end = item
    if isinstance(end, Done):
        return 9, rank
    if isinstance(end, Died):
        return 0, rank
    if end.error is None:
        return 4, rank
    if isinstance(end.error, LostRankError):
        return 5, rank
    if isinstance(end.error, RunError):  # that another rank cannot go on may be what it says
        return 2, rank
    return (3 if isinstance(end.error, InterruptedRunError) else 1), rank


def _death(end: Died) -> str:
    if end.status == -signal.SIGKILL:
        return "was killed (SIGKILL): by somebody, or by the system because RAM ran out"
    how = f"ended by {signal.Signals(-end.status).name}" if end.status < 0 else f"ended with status {end.status}"
    words = [f"    {line}" for line in end.last_words.splitlines()]
    return "\n".join([how + (", and printed" if words else ""), *words])


def _named(error: NbqloraError, name: str) -> NbqloraError:
    """The same error, with who met it; an error of the options names their lines already."""
    if not isinstance(error, ValueError):
        error.args = (f"{name}: {error}", *error.args[1:])
    return error
