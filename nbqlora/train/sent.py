"""A step's figures on their way from the card to the host, so that nothing waits for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch


def clip_(gradient: torch.Tensor, most: float) -> torch.Tensor:
    """Scale a flat gradient in place so that its norm is at most ``most``; the norm before, 0-d."""
    norm = torch.linalg.vector_norm(gradient)
    gradient.mul_((most / (norm + 1e-6)).clamp(max=1.0))
    return norm


class SentNumbers:
    """Losses of a step's micro-batches and its gradient norm, on their way to the host.

    Args:
        figures: ``[micro-batches + 1]`` fp32 on the card, the norm last.
        of_all: loss and tokens of all ranks, fp64 on the card; None where this one is alone.
        norm_may_be_infinite: a loss scale looks after it.
        fail: raises for a step that is not finite, given the losses.
    """

    def __init__(
        self,
        figures: torch.Tensor,
        n_tokens: int,
        *,
        of_all: torch.Tensor | None = None,
        norm_may_be_infinite: bool,
        fail: Callable[[list[float]], None],
    ) -> None:
        self.n_tokens, self._fail, self._only_losses = n_tokens, fail, norm_may_be_infinite
        self._host, self._of_all = _sent(figures), None if of_all is None else _sent(of_all)
        self._arrived = torch.cuda.current_stream(figures.device).record_event()

    def read(self) -> tuple[float, float | None]:
        """Loss and norm. Raises NonFiniteLossError."""
        self._arrived.synchronize()
        *losses, norm = self._host.tolist()
        loss = math.fsum(losses) if all(map(math.isfinite, losses)) else math.nan
        if self._of_all is not None:
            loss, self.n_tokens = self._of_all[0].item(), int(self._of_all[1].item())
        if not math.isfinite(loss) or not (self._only_losses or math.isfinite(norm)):
            self._fail(losses)
        return loss, norm


def _sent(figures: torch.Tensor) -> torch.Tensor:
    host = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
    return host.copy_(figures, non_blocking=True)
