"""The input embedding in host memory: a frozen matrix of which a micro-batch reads one row for each token.

1.0 GiB of an 8B model's 5.3 is read once a micro-batch, and nothing of it is trained. With long rows on a small card
that room is worth more than the copy: 98,304 rows of 4,096 in fp16 are 0.75 GiB, a tenth of a second over PCIe, beside
minutes of arithmetic. The ids have to be known on the host, so the forward waits for what the card has still to do; and
a step that waits cannot be captured.
"""

from __future__ import annotations

from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.plan import Replacement

# Rows that are copied at once; two parts of so many are pinned.
ROWS_AT_ONCE = 2048
# An attribute of the embedding's instance.
ATTRIBUTE = "_nbqlora_on_host"


class HostEmbedding:
    """``ids [...]`` -> ``[..., d]`` on the device, of a matrix on the host.

    Args:
        weight: ``[vocabulary, d]``, on the host, in the dtype of the result.
        device: where results are.
    """

    def __init__(self, weight: torch.Tensor, device: torch.device) -> None:
        self.weight, self.device = weight, device
        on_card = device.type == "cuda"
        self._parts = [torch.empty(ROWS_AT_ONCE, weight.shape[1], dtype=weight.dtype, pin_memory=on_card) for _ in "ab"]
        self._copied = [torch.cuda.Event() for _ in self._parts] if on_card else []

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up; the copies run on the current stream."""
        places = ids.flatten().cpu()
        out = torch.empty(places.numel(), self.weight.shape[1], dtype=self.weight.dtype, device=self.device)
        for n, (some, rows) in enumerate(zip(places.split(ROWS_AT_ONCE), out.split(ROWS_AT_ONCE), strict=True)):
            part = self._parts[n % 2][: some.numel()]
            if self._copied:
                self._copied[n % 2].synchronize()  # what lies there may not be on the card yet
            torch.index_select(self.weight, 0, some, out=part)
            rows.copy_(part, non_blocking=True)
            if self._copied:
                self._copied[n % 2].record()
        return out.view(*ids.shape, -1)


def embedding_to_host(model: Any) -> Replacement:
    """Move the input embedding of a loaded model to the host; its parameter is gone from the model.

    Raises:
        ModelError: it is of another kind, is trained, or is the head's matrix too.
    """
    module = model.get_input_embeddings()
    if because := _not_alone(model, module):
        raise ModelError(f"the embedding cannot be in host memory: {because}; set offload_embedding = false")
    weight = module._parameters.pop("weight").data
    held = HostEmbedding(weight.to("cpu", copy=True), weight.device)
    # No parameter any more: whoever asks the model for its device asks its first one.
    module.weight = held.weight
    module.forward = held
    setattr(module, ATTRIBUTE, held)
    return Replacement(
        path="embedding",
        old=f"on {weight.device.type}",
        new="in host memory",
        because=f"{weight.nbytes / 2**30:.2f} GiB of the card for a copy of each row that is read",
    )


def embedding_back(model: Any) -> None:
    """Undo :func:`embedding_to_host`, if it was called: the matrix is a parameter on the device again."""
    module = model.get_input_embeddings()
    held = module.__dict__.pop(ATTRIBUTE, None)
    if held is not None:
        del module.__dict__["forward"], module.__dict__["weight"]
        module.weight = torch.nn.Parameter(held.weight.to(held.device, copy=True), requires_grad=False)


def embedding_is_on_host(model: Any) -> bool:
    """Whether :func:`embedding_to_host` was called on it."""
    return hasattr(model.get_input_embeddings(), ATTRIBUTE)


def _not_alone(model: Any, module: Any) -> str:
    if type(module) is not torch.nn.Embedding:
        return f"it is a {type(module).__name__}"
    if any(p.requires_grad for p in module.parameters()):
        return "it is trained"
    head = model.get_output_embeddings()
    if head is not None and head.weight is module.weight:
        return "the head shares its matrix"
    if module.max_norm is not None:
        return "it norms what it reads"
    return ""
