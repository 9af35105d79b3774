"""Two processes with a card each, started as ``torchrun`` starts them; what each saw is read from a file."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# For one to end after the other has failed; it may wait for it in a collective.
ENDED_SECONDS = 20


def told_by_two(job: str, model: Path, out: Path, *, seconds: float) -> list[dict[str, Any]]:
    """What ``python -m tests.gpu.JOB MODEL OUT`` writes to ``OUT/rank-N.json``.

    Args:
        seconds: after which both are killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What a run needs may lie in PYTHONPATH; what a rank says goes to a file, for a full pipe would stop it.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    said, ranks = [out / f"said-{rank}" for rank in (0, 1)], []
    for rank in (0, 1):
        own = {
            "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": rank, "PYTHONPATH": path, "NCCL_NVLS_ENABLE": 0,
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in own.items()}}
        command = [sys.executable, "-m", f"tests.gpu.{job}", str(model), str(out)]
        with said[rank].open("w") as file:
            ranks.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=file))
    _wait(ranks, seconds)
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(file.read_text()[-3000:] for file in said)
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def _wait(ranks: list[subprocess.Popen[bytes]], seconds: float) -> None:
    """Until both have ended; kills what is left when one has failed, or when it takes too long."""
    end = time.monotonic() + seconds
    try:
        while any(rank.poll() is None for rank in ranks) and time.monotonic() < end:
            if any(rank.returncode for rank in ranks):
                end = min(end, time.monotonic() + ENDED_SECONDS)
            time.sleep(0.2)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
