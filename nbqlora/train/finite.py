"""A stop at the first loss or gradient that is not finite, before it reaches the adapter, with the rows named."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
from transformers import TrainerCallback

from nbqlora.core.errors import NonFiniteLossError
from nbqlora.engine.adapters import FlatAdapters
from nbqlora.train.batch import MicroBatch, count_tokens, documents
from nbqlora.train.enduring_trainer import EnduringTrainer
from nbqlora.train.events import StepMeter
from nbqlora.train.ranks import Ranks
from nbqlora.train.sent import SentNumbers

# documents' token ids -> numbers of the rows they came from
FindRows = Callable[[list[list[int]]], tuple[int, ...]]


class FiniteTrainer(EnduringTrainer):
    """Looks at each step's figures between its gradients and its optimizer.

    A subclass sets what it needs for that, and adds :class:`FiniteCallback`.
    """

    _ranks: Ranks
    _meter: StepMeter
    _find_rows: FindRows
    _norm: torch.Tensor | None
    _adapters: FlatAdapters | None

    def sums(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum and number of the losses of a batch's learned tokens."""
        raise NotImplementedError

    def check_finite(self) -> None:
        """Before the optimizer's step: read the step's loss once; stop before a NaN reaches the adapter.

        Where steps are captured nothing is read: the optimizer is told on the card to leave the adapter alone if a
        figure is not finite, and the figures are read a step later.

        Raises:
            NonFiniteLossError: naming the rows, with the adapter as the last good step left it.
        """
        batches, self._micro_batches = self._micro_batches, []
        losses = self.stepping.in_step(lambda: torch.stack([b.loss for b in batches]))
        if losses is None:  # the others wait for their sum all the same
            losses = torch.tensor([float(b.loss) for b in batches])
        n_tokens = sum(count_tokens(b.inputs) for b in batches)
        if self._reads_later():
            send = partial(self._sent, batches, losses, n_tokens, self._sum_of_all(losses, n_tokens))
            self._meter.numbers = self.stepping.in_step(send)
            self._norm = None
            return
        loss, n_tokens_of_all = self._ranks.total(float(losses.sum()), n_tokens)
        self._meter.loss, self._meter.n_tokens = loss, int(n_tokens_of_all)
        scaled = self.accelerator.scaler is not None
        if math.isfinite(self._meter.loss) and (scaled or self._gradients_are_finite()):
            return
        self._not_finite(batches, losses.tolist(), self.state.global_step)

    def _reads_later(self) -> bool:
        """Figures may come a step late: steps are captured, no tracker waits, and the optimizer can skip by itself."""
        fused = isinstance(getattr(self.optimizer, "optimizer", self.optimizer), torch.optim.AdamW)
        return self._loaded.micro_step().captures and fused and self._adapters is not None and not self.args.report_to

    def _sum_of_all(self, losses: torch.Tensor, n_tokens: int) -> torch.Tensor | None:
        """Loss and tokens of all ranks, on the card; no part of what may be tried again, for they are added once."""
        if self._ranks.alone:
            return None
        device = self._loaded.device

        def of_this() -> torch.Tensor:
            loss = losses.to(device, torch.float64).sum()
            return torch.stack([loss, torch.full_like(loss, n_tokens)])

        return self._ranks.add_(self.stepping.once(of_this))

    def _sent(
        self, batches: list[MicroBatch], losses: torch.Tensor, n_tokens: int, of_all: torch.Tensor | None
    ) -> SentNumbers:
        flat = self._adapters
        assert flat is not None
        norm = torch.linalg.vector_norm(flat.all_gradients()) if self._norm is None else self._norm
        figures = torch.cat([losses.float(), norm.float().reshape(1)])
        scaled = self.accelerator.scaler is not None
        if not scaled:
            optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
            # The same on all ranks: the norm is that of all gradients.
            decisive = figures if of_all is None else torch.cat([of_all[:1].float(), figures[-1:]])
            optimizer.grad_scale, optimizer.found_inf = None, (~torch.isfinite(decisive).all()).float()
        step = self.state.global_step
        return SentNumbers(
            figures,
            n_tokens,
            of_all=of_all,
            norm_may_be_infinite=scaled,
            fail=lambda found: self._not_finite(batches, found, step),
        )

    def _not_finite(self, batches: list[MicroBatch], losses: Sequence[float], last_step: int) -> NoReturn:
        bad = [b for b, loss in zip(batches, losses, strict=True) if not math.isfinite(loss)]
        loss_is_finite = not self._ranks.any(bool(bad))
        suspects = batches if loss_is_finite else bad
        documents = [ids.tolist() for b in suspects for ids in self._failing_documents(b.inputs)]
        rows = self._ranks.gathered(self._find_rows(documents) if documents else ())
        raise NonFiniteLossError(_not_finite(loss_is_finite, last_step, list(dict.fromkeys(chain(*rows)))))

    def _failing_documents(self, inputs: dict[str, Any]) -> list[torch.Tensor]:
        """Token ids of the documents whose own loss is not finite; of all when each alone is fine."""
        found = documents(inputs)
        with torch.no_grad():
            losses = [self.sums({"input_ids": ids[None], "labels": labels[None]})[0] for ids, labels in found]
        bad = [ids for (ids, _), loss in zip(found, losses, strict=True) if not math.isfinite(float(loss))]
        return bad or [ids for ids, _ in found]

    def _gradients_are_finite(self) -> bool:
        flat = self._adapters
        if flat is not None:
            return bool(torch.isfinite(torch.linalg.vector_norm(flat.all_gradients())))
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))


class FiniteCallback(TrainerCallback):
    """Calls the check at the one moment between gradients and optimizer."""

    def __init__(self, trainer: FiniteTrainer) -> None:
        self._trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All gradients of the step are there, clipped; nothing was updated yet."""
        self._trainer.check_finite()


def _not_finite(loss_is_finite: bool, last_step: int, rows: Sequence[int]) -> str:
    what, where = "gradient" if loss_is_finite else "loss", ", ".join(map(str, rows)) or "(not found)"
    kept = f"the adapter of step {last_step} was kept" if last_step else "no step was taken before it"
    return (
        f"the {what} of step {last_step + 1} is not finite, on the data's rows {where}; {kept}\n"
        "  look at these rows; if they are fine, a smaller learning_rate helps"
    )
