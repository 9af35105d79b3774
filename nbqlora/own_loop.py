"""The public functions for a loop of one's own, or any TRL trainer: the engine without the rest of a run.

What a cell can do is in :mod:`nbqlora.api`; none of these can be asked for in one, since each takes or gives a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nbqlora import view
from nbqlora.core.plan import Plan, Replacement

if TYPE_CHECKING:
    from nbqlora.engine.loaded import LoadedModel

view.register_all()


def load(model: str, **options: Any) -> LoadedModel:
    """A model in NF4 with fresh adapters and the fused layers, for a loop of one's own or any TRL trainer.

    It is planned for micro-batches of ``per_device_train_batch_size`` rows of ``max_length`` tokens, all learned.

    Args:
        model: a hub id, a folder, or ``"demo"``.
        **options: those of :func:`nbqlora.finetune` except ``data``.

    Returns:
        ``.model``, a ``PeftModel`` with PEFT's names; ``.optimizer(learning_rate=...)``; ``.train_step(optimizer,
        input_ids=, labels=)``, one whole step, captured where it can be; ``.plan``, ``.replacements``.

    Raises:
        ConfigError, DoesNotFitError, ModelError: as :func:`nbqlora.finetune`.

    Example:
        >>> loaded = nbqlora.load("demo", max_length=512, per_device_train_batch_size=2)
        >>> optimizer = loaded.optimizer(learning_rate=2e-4)
        >>> loss = loaded.train_step(optimizer, input_ids=ids, labels=ids)
    """
    from nbqlora.run.loading import load_to_train

    return load_to_train(model, options)


def optimize(model: Any, plan: Plan | None = None) -> tuple[Replacement, ...]:
    """Put the fused layers on a model that is loaded already: a ``PeftModel``, NF4 or not.

    Instances are changed, never classes; :func:`restore` undoes it.

    Args:
        plan: for the layers' policies; None keeps everything.

    Returns:
        What was replaced, and what was looked at and left, each with the reason.
    """
    from nbqlora.engine.optimize import optimize as put_on

    return put_on(model, plan)


def restore(model: Any) -> None:
    """Undo :func:`optimize`; parameters and gradients keep their values."""
    from nbqlora.engine.optimize import restore as take_off

    take_off(model)
