"""The loss of the head, ours beside the one that TRL's trainer computes: ms and memory, forward and backward.

    python tests/bench/head_loss.py [--out FILE]

TRL's is the autograd function behind its fused head, with the outputs that its SFT trainer asks for; both score the
same supervised rows. In turns, medians of ten; the peak is what exists beyond hidden states and weight.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from nbqlora.core.specs import HeadSpec
from nbqlora.engine.head import head_loss

SHAPES = {"8b": (4096, 128256), "1b": (2048, 128256), "qwen 0.5b": (896, 151936)}
ROWS, ROUNDS = (1024, 4096, 8192), 10
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(chunk: int) -> Loss:
    """Ours, with so many tokens' logits at once."""
    head = HeadSpec(tied=False)
    return lambda hidden, weight, targets: head_loss(hidden, weight, None, targets, head, chunk)


def of_trl(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """TRL's, with what its SFT trainer wants beside the loss."""
    from trl.trainer import utils

    outputs = ("log_probs", "entropy", "is_top1")
    found = utils._ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, utils._CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, outputs
    )
    return -found[0].sum()


def measure(loss: Loss, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[float, int, float]:
    """Milliseconds, bytes beyond the operands, and the loss."""
    hidden = hidden.detach().requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    found = loss(hidden, weight, targets)
    found.backward()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated() - before, float(found.detach())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    stacks: dict[str, Loss] = {"ours 256": ours(256), "ours 1024": ours(1024), "ours 4096": ours(4096), "trl": of_trl}
    for shape, (d, vocab) in SHAPES.items():
        weight = torch.randn(vocab, d, device="cuda", dtype=torch.bfloat16) * 0.02
        for rows in ROWS:
            hidden = torch.randn(rows, d, device="cuda", dtype=torch.bfloat16)
            targets = torch.randint(0, vocab, (rows,), device="cuda")
            found: dict[str, list[tuple[float, int, float]]] = {name: [] for name in stacks}
            for i in range(ROUNDS + 2):
                for name in list(stacks)[:: 1 if i % 2 else -1]:
                    line = measure(stacks[name], hidden, weight, targets)
                    if i > 1:
                        found[name].append(line)
            line = {
                "op": "head_loss", "shape": shape, "rows": rows, "card": torch.cuda.get_device_name(),
                "torch": torch.__version__, "command": "python tests/bench/head_loss.py",
                "stacks": {
                    name: {
                        "ms": round(statistics.median(ms for ms, _, _ in lines), 3),
                        "mib": round(max(n for _, n, _ in lines) / 2**20, 1),
                        "loss": lines[0][2],
                    }
                    for name, lines in found.items()
                },
            }  # fmt: skip
            print(json.dumps(line), flush=True)
            if asked.out:
                with asked.out.open("a") as file:
                    file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
