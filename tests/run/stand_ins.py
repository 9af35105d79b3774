"""What workers do in tests that need no model: tell, wait, obey, fail, die. Only what is small is imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from nbqlora.core.errors import DataError, MemoryExhaustedError, NbqloraError
from nbqlora.core.events import NoteEvent, OomEvent, PhaseEvent, SavedEvent, StepEvent
from nbqlora.core.events import Observer as Observe

RANK = int(os.environ.get("RANK", "0"))
PATIENCE_SECONDS = 60.0


def nothing() -> None:
    """Prepared already."""


def says() -> NoteEvent:
    """Prepared, but for something."""
    return NoteEvent(text=f"of rank {RANK}", elapsed_seconds=0.0)


def step(number: int, peak_bytes: int = 0, total: int = 100) -> StepEvent:
    return StepEvent(
        step=number, total_steps=total, loss=1.0 + RANK, learning_rate=0.1, grad_norm=None, n_tokens=1, seconds=0.1,
        peak_bytes=peak_bytes, elapsed_seconds=0.0,
    )  # fmt: skip


def environment(observe: Observe) -> dict[str, str]:
    return {**os.environ, "sys.path": os.pathsep.join(sys.path), "session": str(os.getsid(0) == os.getpid())}


def meet(observe: Observe) -> int:
    """All ranks add up their numbers, from 1 on."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    mine = torch.tensor([RANK + 1])
    dist.all_reduce(mine)
    dist.destroy_process_group()
    return int(mine)


def meet_ahead(observe: Observe) -> list[Any]:
    """A group that was joined ahead is the first run's, which leaves it; the next one joins one of its own."""
    import torch
    import torch.distributed as dist

    from nbqlora.run.ranks import join_ahead, joined

    hook = sys.excepthook
    join_ahead(os.environ)
    ahead, told = dist.group.WORLD, []
    for _ in range(2):
        with joined(os.environ) as rank:
            mine = torch.tensor([rank.number + 1])
            dist.all_reduce(mine)
            told += [int(mine), dist.group.WORLD is ahead, "RANK" in os.environ]
        told += [dist.is_initialized(), os.environ["RANK"] == str(RANK), sys.excepthook is hook]
    return told


def take_steps(observe: Observe) -> str:
    """Two steps; the other ranks hold more, and are faster."""
    for number in (1, 2):
        time.sleep(0.0 if RANK else 0.3)
        observe(step(number, peak_bytes=1000 * number * (1 + RANK)))
    return f"of rank {RANK}"


def run_short(observe: Observe) -> None:
    """Both meet the same shortage, rank 1 another one."""
    short = {"phase": "forward", "asked_bytes": 5, "elapsed_seconds": 0.0}
    observe(OomEvent(step=1, action="smaller chunks", **short))
    if RANK:
        observe(OomEvent(step=2, action="recompute", **short))


def draw(observe: Observe) -> None:
    """As tqdm does it, over and over in one line."""
    print("something else", file=sys.stderr)
    for share in (10, 45):
        print(f"\rmodel.safetensors:  {share}%|###  | {share}/100", end="", file=sys.stderr, flush=True)
        time.sleep(1.0)


def wait_for_ever(observe: Observe) -> None:
    observe(step(1))
    time.sleep(PATIENCE_SECONDS)


def die(observe: Observe, rank: int, number: int) -> None:
    """One rank is killed by a signal, after a checkpoint; the others wait for it."""
    if RANK == 0:
        observe(step(1))
        observe(SavedEvent(step=1, path="checkpoint", n_bytes=1, elapsed_seconds=0.0))
    if rank == RANK:
        os.kill(os.getpid(), number)
    time.sleep(PATIENCE_SECONDS)


def leave(observe: Observe) -> None:
    """Rank 1 ends without a word but what it printed."""
    if RANK == 1:
        print("what it printed last", flush=True)
        os._exit(7)
    time.sleep(PATIENCE_SECONDS)


def fail(observe: Observe, rank: int, error: NbqloraError | str) -> None:
    """One rank raises; what that does to the others is another error, which comes first."""
    if rank != RANK:
        raise RuntimeError("Connection closed by peer")
    time.sleep(0.3)
    raise RuntimeError(error) if isinstance(error, str) else error


def data_error() -> DataError:
    return DataError("rows.jsonl, line 3: no JSON")


def shortage() -> MemoryExhaustedError:
    return MemoryExhaustedError("no rung is left", tokens=300, room_bytes=1 << 30)


class Heard:
    """Interrupts as they come, each on a line of a file, so that none is counted that comes later."""

    def __init__(self, folder: str) -> None:
        self.file, self.stop = Path(folder) / f"heard-{RANK}", threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)
        self.file.touch()  # ready

    def _handle(self, number: int, frame: object) -> None:
        with self.file.open("a") as file:
            file.write(f"{signal.Signals(number).name}\n")


def obey(observe: Observe, folder: str, times: int, stubborn: int = -1) -> str:
    """Ends after so many interrupts and a moment for one too many; ``stubborn`` is a rank that never does."""
    heard, until = Heard(folder), time.monotonic() + PATIENCE_SECONDS
    while len(list(Path(folder).glob("heard-*"))) < int(os.environ["WORLD_SIZE"]) and time.monotonic() < until:
        time.sleep(0.01)
    observe(step(1))
    told = 0
    while time.monotonic() < until:
        n = len(heard.file.read_text().split())
        if n > told:
            observe(step(1 + n))
            told = n
        if n >= times and stubborn != RANK:
            break
        time.sleep(0.02)
    time.sleep(0.5)
    (Path(folder) / f"saved-{RANK}").touch()
    return " ".join(heard.file.read_text().split())


def without_memory(config: Any, observe: Observe, **settings: Any) -> Any:
    """The ordinary run; from its third micro-batch on rank 1 has no memory for any."""
    import torch

    from nbqlora.run.steps import finetune_config
    from nbqlora.train.enduring_trainer import EnduringTrainer

    run_part, calls = EnduringTrainer.run_part, []

    def short_of(self: EnduringTrainer, inputs: Any, count: Any) -> torch.Tensor:
        calls.append(count)
        if len(calls) > 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
        return run_part(self, inputs, count)

    if RANK == 1:
        EnduringTrainer.run_part = short_of  # type: ignore[method-assign]
    return finetune_config(config, observe, **settings)


def lose_the_other(observe: Observe) -> str:
    """Rank 1 leaves; what rank 0 is told when it asks for it."""
    import torch

    from nbqlora.core.errors import LostRankError
    from nbqlora.run.ranks import joined
    from nbqlora.train.ranks import Ranks

    with joined(os.environ):
        ranks = Ranks(torch.device("cpu"))
        ranks.any(here=False)
        if RANK == 1:
            return ""
        try:
            ranks.any(here=False)
        except LostRankError as error:
            return str(error)
    return "nothing was missed"


def save_slowly(observe: Observe, seconds: float) -> str:
    """Rank 1 ends badly while rank 0 is writing an adapter."""
    if RANK == 1:
        time.sleep(0.3)
        raise shortage()
    observe(step(1))
    observe(PhaseEvent(phase="save", elapsed_seconds=0.0))
    time.sleep(seconds)
    observe(SavedEvent(step=1, path="adapter", n_bytes=1, elapsed_seconds=0.0))
    time.sleep(PATIENCE_SECONDS)
    return ""


def go_on_and_die(observe: Observe) -> None:
    """A run that goes on behind a checkpoint of step 25, and loses a rank before it has another."""
    if RANK == 0:
        observe(step(26))
    time.sleep(0.3)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(PATIENCE_SECONDS)
