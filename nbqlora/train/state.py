"""What a training loop holds between two steps besides the adapter: taken out as tensors and plain values, put back.

Between two steps the future is decided by five things: the parameters, the optimizer's state, the
schedule's, the loss scale, and where four random number generators stand. The data's order is the
sampler's, which is seeded by the epoch or draws from those generators when an epoch begins; so their
position at the beginning of the epoch is kept beside the present one.

Everything becomes tensors by name, and values that JSON holds exactly (Python writes a float so that the
same one is read back). The optimizer's part is in :mod:`nbqlora.train.optimizer_state`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

Tensors = Mapping[str, torch.Tensor]
Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainingState:
    """A loop between two steps, without its adapter.

    Args:
        step: optimizer steps done.
        groups: tensors by group and name: ``optimizer``, ``rng`` (as now) and ``epoch_rng`` (as it was when
            the epoch at hand began; as now between two epochs).
        values: what is no tensor, for JSON.
    """

    step: int
    groups: Mapping[str, Tensors]
    values: Values

    def __repr__(self) -> str:
        return f"TrainingState(after step {self.step})"


def random_state() -> dict[str, torch.Tensor]:
    """Where the generators of Python, numpy, torch and the card stand."""
    _, words, spare = random.getstate()
    _, keys, position, has_spare, np_spare = np.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_spare": torch.tensor([] if spare is None else [spare], dtype=torch.float64),
        "numpy": torch.tensor([*map(int, keys), position, has_spare], dtype=torch.int64),
        "numpy_spare": torch.tensor([np_spare], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Tensors) -> None:
    """Undo of :func:`random_state`; a card's generator is left alone when the state is from a machine without one."""
    spare = state["python_spare"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), spare[0] if spare else None))
    *keys, position, has_spare = state["numpy"].tolist()
    numbers = np.array(keys, dtype=np.uint32)
    np.random.set_state(("MT19937", numbers, position, has_spare, state["numpy_spare"].item()))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


@dataclass(frozen=True, kw_only=True)
class Generators:
    """Where torch's generators stand, from which dropout draws; taken before each micro-batch, so cheap.

    Args:
        cpu: the host's.
        card: that of a card; None for a model on the host.
    """

    cpu: torch.Tensor
    card: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> Generators:
        """As they stand; nothing waits for the card."""
        return cls(cpu=torch.get_rng_state(), card=torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def put_back(self, device: torch.device) -> None:
        """Let them stand so again."""
        torch.set_rng_state(self.cpu)
        if self.card is not None:
            torch.cuda.set_rng_state(self.card, device)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Within, random numbers may be drawn; afterwards the generators stand where they stood."""
    before = random_state()
    try:
        yield
    finally:
        set_random_state(before)
