"""A model on its device, ready to train or to talk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from nbqlora.core.plan import Plan, Replacement
from nbqlora.core.specs import ModelSpec
from nbqlora.engine.fused import engine_of
from nbqlora.engine.head import LossFunction, chunked_loss, own_logits_loss
from nbqlora.engine.micro_step import MicroStep
from nbqlora.engine.optimize import apply_plan
from nbqlora.engine.optimizer import make_optimizer


@dataclass(kw_only=True)
class LoadedModel:
    """The model with its adapter, and what was done to it.

    Args:
        model: a ``PeftModel``, PEFT's own parameter names.
        tokenizer: transformers' tokenizer.
        spec: the model's shape.
        device: where it is.
        dtype: arithmetic of forward and backward.
        replacements: what was changed on it, and what was looked at and left.
        plan: what it was loaded for; None for a model that only talks.
        loss: of a batch, summed; None for a model that only talks.
        captures: steps may be captured.
    """

    model: Any
    tokenizer: Any
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    replacements: tuple[Replacement, ...] = ()
    plan: Plan | None = None
    loss: LossFunction | None = None
    captures: bool = True
    _step: MicroStep | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"LoadedModel({self.spec.name} on {self.device}, {str(self.dtype).removeprefix('torch.')})"

    def trainable(self) -> Iterable[torch.nn.Parameter]:
        """The parameters that train."""
        return (p for p in self.model.parameters() if p.requires_grad)

    def optimizer(self, *, learning_rate: float, optim: str = "adamw_torch_fused", **settings: Any) -> Any:
        """AdamW as the trainer uses it: one launch for all adapters.

        Args:
            optim: ``adamw_torch_fused``, ``adamw_torch`` or ``adamw_8bit``.
            **settings: ``weight_decay``, ``betas``, ``eps``.
        """
        engine = engine_of(self.model)
        adapters = None if engine is None else engine.scratch.adapters
        others = [p for p in self.trainable() if adapters is None or p not in adapters]
        return make_optimizer(adapters, others, optim=optim, learning_rate=learning_rate, **settings)

    def micro_step(self) -> MicroStep:
        """Loss and gradients of a micro-batch, captured where it can be; one for the model."""
        if self._step is None:
            if self.plan is None or self.loss is None:
                raise ValueError("this model was loaded to talk; load it with nbqlora.load to train it")
            plan = self.plan
            self._step = MicroStep(
                self.model,
                self.loss,
                plan.model.head,
                chunk_tokens=plan.loss_chunk_tokens,
                most_tokens=plan.most_tokens,
                longest_document=min(plan.max_length, plan.data.max_tokens),
                pad_token_id=getattr(self.tokenizer, "pad_token_id", None) or 0,
                autocast=partial(autocast, self),
                device=self.device,
                replay=self.captures,
            )
        return self._step

    def train_step(
        self, optimizer: Any, *, input_ids: torch.Tensor, labels: torch.Tensor, **packing: Any
    ) -> torch.Tensor:
        """One whole step: forward, backward, optimizer, gradients cleared.

        Args:
            optimizer: of :meth:`optimizer`.
            input_ids, labels: ``[rows, seq]`` on the model's device; -100 is not learned.
            **packing: ``position_ids`` (documents begin where they restart), ``cu_seq_lens_q``, ``attention_mask``.

        Returns:
            Mean loss of the learned tokens, 0-d, detached.
        """
        count = (labels[:, 1:] != -100).sum().clamp(min=1)
        batch = {"input_ids": input_ids, "labels": labels, **packing}
        total = self.micro_step()(batch, 1.0 / count.float())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total / count

    def run_as(self, plan: Plan, *, captures: bool = True) -> None:
        """Go on as another plan says: policies, loss chunk and MLP tiles; the model and its adapters stay.

        Args:
            captures: False launches every step kernel by kernel.
        """
        self.release()
        if self.loss is not own_logits_loss:
            self.loss = chunked_loss(plan.model.head, plan.loss_chunk_tokens)
        apply_plan(self.model, plan)
        self.plan, self.captures = plan, captures

    def give_up_step(self) -> None:
        """After a step that was broken off: drop what it left, and what was captured."""
        self.release()
        engine = engine_of(self.model)
        if engine is not None:
            engine.scratch.handed = engine.scratch.joined = None
            if engine.scratch.slab is not None:
                engine.scratch.slab.forget()

    def release(self) -> None:
        """Drop what was captured for training; the model stays."""
        if self._step is not None:
            self._step.release()
            self._step = None


def autocast(loaded: LoadedModel) -> Any:
    """The context that training and generation run in: mixed precision below fp32, nothing in fp32."""
    enabled = loaded.dtype != torch.float32
    # Nothing of the adapters is cast by autocast where layers are fused, and a captured step must not cache.
    return torch.autocast(loaded.device.type, dtype=loaded.dtype, enabled=enabled, cache_enabled=False)
