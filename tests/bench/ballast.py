"""A smaller card: another process holds the rest of this one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Holds the card until its input ends; says when it does.
BALLAST = """
import sys, torch
free = torch.cuda.mem_get_info()[0]
held = torch.empty(free - int(float(sys.argv[1]) * 2**30), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def ballast(gib: float) -> Iterator[None]:
    """Leave ``gib`` of the card free; 0 leaves it alone."""
    if not gib:
        yield
        return
    command = [sys.executable, "-c", BALLAST, str(gib)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdin
        if process.stdout.readline() != "held\n":
            raise RuntimeError("the card could not be held")
        yield
        process.stdin.close()
