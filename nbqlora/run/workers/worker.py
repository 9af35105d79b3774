"""One worker: ``python -m nbqlora.run.workers.worker FD`` hears what to do on a line, does it and tells.

A thread listens from the first moment on, before anything large is imported: interrupts come through it, and when the
line ends, whoever started this process is gone.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import InterruptedRunError, NbqloraError
from nbqlora.core.events import Event, NoteEvent, Observer
from nbqlora.core.report import Report
from nbqlora.run.beside import Beside
from nbqlora.run.workers.lines import Do, Done, Failed, Interrupt, Told

# For a step that is under way when the notebook is closed, and its checkpoint.
LAST_SECONDS = 10.0
# Behind each interrupt. Python calls handlers in the order of their numbers, so when this one's is called, that one's
# was; and it ends a call that began to wait just as the interrupt came.
BEHIND = signal.SIGUSR2
TRIES, TRY_SECONDS = 5, 1.0

BEFORE_TRAINING = "interrupted before training began; nothing was saved"

Prepare = Callable[[], Event | None]
Work = Callable[[Observer], Report]


def get_ready(config: FinetuneConfig, called: float) -> Event | None:
    """What a run takes seconds for whatever its rows are: its imports, 6 s, and beside them its ranks and its card.

    Those threads import nothing of what this one does: two that import the same modules may each see half of them.

    Args:
        called: when the user asked for the run, as ``Journal`` takes it.

    Returns:
        What there is to say.

    Raises:
        RunError: this rank cannot join the others.
    """
    from nbqlora.core.ranks import rank_of
    from nbqlora.run.ranks import join_ahead, meet
    from nbqlora.run.rehearsing import rehearse, shape_for

    rank, shape, imported = rank_of(os.environ), shape_for(config), threading.Event()
    joining = Beside(partial(join_ahead, os.environ))

    def others_are_here() -> None:
        joining.result()
        meet()

    def rehearsing() -> str:
        imported.wait()
        return rehearse(config, shape, rank, others_are_here)

    card = Beside(rehearsing)
    import torch.fx.experimental.symbolic_shapes  # noqa: F401  autograd imports it when it is used first

    imported.set()
    import nbqlora.run.steps
    import nbqlora.train.trainer  # noqa: F401

    joining.result()
    said = card.result()
    return NoteEvent(text=said, elapsed_seconds=time.perf_counter() - called) if said else None


def main(line: Connection) -> int:
    """Prepare, work, tell how it ended. Returns the exit status."""
    jobs: SimpleQueue[bytes] = SimpleQueue()
    taken = threading.Event()
    signal.signal(BEHIND, lambda number, frame: taken.set())
    threading.Thread(target=_listen, args=(line, jobs, taken), name="nbqlora-line", daemon=True).start()

    def say(value: Any) -> None:
        # Where nobody hears it any more, the listener knows, and gives this process its last seconds.
        with suppress(OSError):
            line.send(value)

    def tell(event: Event) -> None:
        say(Told(event=event))

    try:
        prepare: Prepare = pickle.loads(jobs.get())
        if (told := prepare()) is not None:
            tell(told)
        work: Work = pickle.loads(jobs.get())
        say(Done(report=work(tell)))
    except BaseException as error:
        ours = error if isinstance(error, NbqloraError) else None
        if isinstance(error, KeyboardInterrupt):
            ours = ours or InterruptedRunError(BEFORE_TRAINING)
        text = f"{type(error).__name__}: {error}".removesuffix(": ")
        say(Failed(error=ours and ours.with_traceback(None), text=text, trace=traceback.format_exc()))
        return 1
    return 0


def _listen(line: Connection, jobs: SimpleQueue[bytes], taken: threading.Event) -> None:
    interrupted = False
    while True:
        try:
            heard = line.recv()
        except (EOFError, OSError):
            break
        if isinstance(heard, Do):
            jobs.put(heard.what)
        elif isinstance(heard, Interrupt):
            interrupted = True
            _interrupt(heard.number, taken)
    _end_alone(interrupted)


def _interrupt(number: int, taken: threading.Event) -> None:
    """Interrupt the main thread, and see that it takes it before the next one: Python makes one of two that are close.

    Whoever is in a long call takes it later.
    """
    main = threading.main_thread().ident
    assert main is not None
    taken.clear()
    signal.pthread_kill(main, number)
    for _ in range(TRIES):
        signal.pthread_kill(main, BEHIND)
        if taken.wait(TRY_SECONDS):
            break


def _end_alone(interrupted: bool) -> None:
    """Nobody is there any more: finish the step and save as after any SIGTERM, but not for long."""
    signal.alarm(int(LAST_SECONDS) + 1)  # needs no thread: Python may have come to its end, and hang there
    if not interrupted:  # a second one would drop the step
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_SECONDS)
    os.killpg(os.getpid(), signal.SIGKILL)  # data workers too


if __name__ == "__main__":
    sys.exit(main(Connection(int(sys.argv[1]))))
