"""Worker processes: started with what torch.distributed looks for, and all gone when the context is left."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from nbqlora.core.ranks import Rank, see_one_card
from nbqlora.data.scratch import ScratchFolder
from nbqlora.run.workers import worker
from nbqlora.run.workers.lines import Do, Interrupt

HOST = "127.0.0.1"
EXIT_SECONDS = 30.0
LAST_LINES = 12


@dataclass(frozen=True, kw_only=True)
class Worker:
    """One process.

    Args:
        line: on which it is told what to do, and tells.
        log: the file with all that it printed.
    """

    rank: int
    process: subprocess.Popen[bytes]
    line: Connection
    log: Path

    def last_words(self, n_lines: int = LAST_LINES) -> str:
        """The end of what it printed; a bar that was drawn over and over is one line, with all its states."""
        with suppress(OSError), self.log.open(encoding="utf-8", errors="replace", newline="\n") as printed:
            return "".join(deque((line for line in printed if line.strip()), n_lines)).strip()
        return ""

    def kill(self) -> None:
        """It and every process that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


class Workers:
    """Processes that work together; a context manager, behind which none of them is left.

    Args:
        n: how many.
        prepare: what each does first, while the work is still being prepared here.
    """

    def __init__(self, n: int, prepare: worker.Prepare) -> None:
        self._folder, self._store = ScratchFolder(), _store()
        self.port: int = self._store.port
        self.all: list[Worker] = []
        try:
            for rank in range(n):
                self.all.append(_start(rank, environment(rank, n, self.port, os.environ), self._folder.path))
            self.tell(prepare)
        except BaseException:
            self.close()
            raise

    def tell(self, work: Any) -> None:
        """Have each call this function when it is done with what it was told before."""
        self._send(Do(what=pickle.dumps(work)))

    def interrupt(self, number: int) -> None:
        """One interrupt for each."""
        self._send(Interrupt(number=number))

    def _send(self, value: object) -> None:
        for each in self.all:
            with suppress(OSError):  # one that died is found by whoever listens to it
                each.line.send(value)

    def wait(self) -> None:
        """Let them come to their end; they have told it already."""
        until = monotonic() + EXIT_SECONDS
        for each in self.all:
            with suppress(subprocess.TimeoutExpired):
                each.process.wait(max(0.0, until - monotonic()))

    def close(self) -> None:
        """End what is left of them, and everything that was made for them."""
        for each in self.all:
            if each.process.returncode is None:  # else its number may be another process's by now
                each.kill()
        for each in self.all:
            each.process.wait()
            each.line.close()
        self._store = None
        self._folder.remove()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _store() -> Any:
    """The store where they meet: on this machine's own interface, on a port that the system gives."""
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        # The store closes what it listens on.
        return TCPStore(HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())


def environment(rank: int, n: int, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """A worker's variables: torch.distributed's, its share of the threads, and where this process finds its modules."""
    threads = max(1, torch.get_num_threads() // n)
    # A host's name need not lead to it.
    interface = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    own = {
        **interface,
        **environ,
        "PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": str(threads),
    }
    # Now, since what a worker imports first may look at the cards.
    see_one_card(Rank(number=rank, n=n, local=rank, n_local=n), own)
    return own


def _start(rank: int, environ: Mapping[str, str], folder: Path) -> Worker:
    ours, theirs = Pipe()
    log = folder / f"rank-{rank}.log"
    with theirs, log.open("wb") as printed:
        number = theirs.fileno()
        process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", worker.__name__, str(number)],
            env=dict(environ), stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT,
            pass_fds=[number], start_new_session=True,
        )  # fmt: skip
    return Worker(rank=rank, process=process, line=ours, log=log)
