"""cuBLAS's workspaces: memory that torch keeps for every stream and thread that ever ran a matmul (32 MiB on an H100).

Nobody gives them back, so that a run leaves them behind, and those of an eager step would stand beside those of the
same step captured. The function that drops them is private to torch, which uses it in the same two places: around a
capture, so that a graph's workspace lies in the graph's own pool, and when memory has to come back. Where a release of
torch has it no longer, they stay.
"""

from __future__ import annotations

import torch


def free_workspaces() -> None:
    """Drop all of them; the next matmul makes what it needs. Nothing that uses one may be running."""
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        clear()
