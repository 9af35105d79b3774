"""AdamW on the flat adapter buffer: one launch where 448 matrices would cost as many.

torch's fused AdamW and bitsandbytes' 8-bit AdamW both take the flat buffer as one parameter; the arithmetic of each
element is theirs. Parameters that are not in the buffer (an adapter on an embedding, say) are stepped beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from nbqlora.engine.adapters import FlatAdapters

FLAT_NAME = "flat_adapters"


def make_optimizer(
    adapters: FlatAdapters | None,
    others: Iterable[torch.nn.Parameter],
    *,
    optim: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Any:
    """An optimizer whose first parameter is the flat buffer.

    Args:
        optim: ``adamw_torch_fused``, ``adamw_torch`` or ``adamw_8bit``.
        adapters: the buffer; None where no layer is fused.
        others: further parameters that train.
    """
    settings = {"lr": learning_rate, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    if optim == "adamw_8bit":
        import bitsandbytes

        base: type = bitsandbytes.optim.AdamW8bit
    else:
        base = torch.optim.AdamW
        settings["fused"] = optim == "adamw_torch_fused"
    return base(list(others), **settings) if adapters is None else _flat_class(base)(adapters, list(others), settings)


def _flat_class(base: type) -> type:
    """``base`` for a flat buffer, whose gradient is always there."""

    class Flat(base):
        def __init__(self, adapters: FlatAdapters, others: list[torch.nn.Parameter], settings: dict[str, Any]) -> None:
            self.adapters = adapters
            self.flat = torch.nn.Parameter(adapters.master, requires_grad=True)
            self.flat.grad = adapters.all_gradients()
            super().__init__([self.flat, *others], **settings)
            # Stepped only if there was a backward since the last zero_grad.
            self.register_step_pre_hook(lambda *_: setattr(self.flat, "grad", adapters.gathered()))
            self.register_step_post_hook(lambda *_: setattr(self.flat, "grad", adapters.all_gradients()))

        def zero_grad(self, set_to_none: bool = True) -> None:
            """The adapters' gradients are gone; the buffer is cleared at the next backward."""
            flat, self.flat.grad = self.flat.grad, None
            super().zero_grad(set_to_none)
            self.flat.grad = flat
            self.adapters.clear_gradients()

    Flat.__name__ = Flat.__qualname__ = f"Flat{base.__name__}"
    return Flat
