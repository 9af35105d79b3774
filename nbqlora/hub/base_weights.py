"""The base of a merge, row by row in fp32: as it was published, or as training saw it.

Training sees a base in NF4: each weight of its linears is rounded to one of 16 values a block, and then to the
arithmetic's dtype. The adapter learned to correct *that* base. Merged into it, the result is what was trained;
merged into the published weights, the rounding is gone and the adapter meets a slightly other base. Both are
wanted, so both are here; notebooks/401 shows the difference.

The NF4 weights are those of the loaded model where there is one, those of the files where they are stored in 4
bits, and otherwise made again from the published weights, tensor by tensor, by the same routine: the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from nbqlora.hub.stored import StoredTensors
from nbqlora.kernels.nf4 import Nf4, absmax_of, dequantize_nf4

BLOCK = 64
NESTED = 256
STATE = ".quant_state.bitsandbytes__nf4"


class OriginalWeights:
    """The tensors of a checkpoint as they are.

    Args:
        device: where rows are handed out.
    """

    def __init__(self, stored: StoredTensors, device: torch.device) -> None:
        self.stored, self.device = stored, device
        self.names = tuple(stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self.stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """How a tensor is stored."""
        return self.stored[name].dtype

    def is_stored_as(self, name: str, dtype: torch.dtype) -> bool:
        """The tensor's values are the file's own, in this dtype."""
        return self.stored[name].dtype == dtype

    def row_unit(self, name: str) -> int:
        """Rows are asked for in multiples of this."""
        return 1

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows of a tensor in fp32, in memory of their own; integers as they are. Raises :class:`ModelError`."""
        values = self.stored[name].read(first, last)
        return values.to(self.device, torch.float32) if values.is_floating_point() else values

    def done(self, name: str) -> None:
        """Nothing more of this tensor will be asked for."""


class Nf4Weights(OriginalWeights):
    """The same base after NF4 and the arithmetic's dtype.

    Args:
        packed: gives a linear's 4-bit weight, or None for a tensor that is not in 4 bits.
        dtype: the arithmetic's.
        give_back: called with a 4-bit weight that is not needed any more.
    """

    def __init__(
        self,
        stored: StoredTensors,
        device: torch.device,
        *,
        packed: Callable[[str], Nf4 | None],
        dtype: torch.dtype,
        give_back: Callable[[Nf4], None] = lambda weight: None,
    ) -> None:
        super().__init__(stored, device)
        self.names = tuple(name for name in stored if not _belongs_to_quantized(name))
        self._packed, self._dtype, self._give_back = packed, dtype, give_back
        self._now: tuple[str, Nf4 | None] = ("", None)
        self._absmax: torch.Tensor | None = None

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the weight, whatever its packed form is."""
        state = _state_of(self.stored, name)
        return super().shape(name) if state is None else tuple(state["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """As the files have it; the arithmetic's for what they have in 4 bits."""
        return super().dtype(name) if _state_of(self.stored, name) is None else self._dtype

    def is_stored_as(self, name: str, dtype: torch.dtype) -> bool:
        """Whole numbers only: all others went through NF4, or through the arithmetic's dtype."""
        return super().is_stored_as(name, dtype) and not dtype.is_floating_point

    def row_unit(self, name: str) -> int:
        """Rows whose elements are whole blocks."""
        state, shape = _state_of(self.stored, name), self.shape(name)
        size = BLOCK if state is None else int(state["blocksize"])
        return size // math.gcd(shape[1], size) if len(shape) == 2 else 1

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """See :class:`OriginalWeights`."""
        weight = self._weight(name)
        if weight is None:
            values = super().rows(name, first, last)
            return values.to(self._dtype).float() if values.is_floating_point() else values
        if self._absmax is None:
            self._absmax = absmax_of(weight).flatten()
        part = _rows_of(weight, self._absmax, first, min(last, weight.n_rows))
        out = torch.empty(part.n_rows, part.n_cols, dtype=self._dtype, device=part.packed.device)
        return dequantize_nf4(part, out).to(self.device, torch.float32)

    def done(self, name: str) -> None:
        """See :class:`OriginalWeights`."""
        held, weight = self._now
        if held == name:
            if weight is not None:
                self._give_back(weight)
            self._now, self._absmax = ("", None), None

    def _weight(self, name: str) -> Nf4 | None:
        if self._now[0] != name:
            self.done(self._now[0])
            self._now = (name, self._packed(name))
        return self._now[1]


def _rows_of(weight: Nf4, absmax: torch.Tensor, first: int, last: int) -> Nf4:
    """Rows of an NF4 weight, whose first element begins a block."""
    begin, end = first * weight.n_cols, last * weight.n_cols
    return Nf4(
        packed=weight.packed[begin // 2 : end // 2],
        absmax=absmax[begin // weight.blocksize : -(-end // weight.blocksize)],
        code=weight.code,
        n_rows=last - first,
        n_cols=weight.n_cols,
        blocksize=weight.blocksize,
    )


def of_model(model: Any) -> dict[str, Nf4]:
    """The 4-bit weights that a loaded model holds, by the path of their linear in the bare model."""
    from bitsandbytes.nn import Linear4bit

    from nbqlora.engine.projection import read_projection

    found: dict[str, Nf4] = {}
    for path, module in model.named_modules():
        if isinstance(module, Linear4bit):
            plain = path.removesuffix(".base_layer").removeprefix("base_model.model.")
            weight = read_projection(plain, module).weight
            assert isinstance(weight, Nf4)
            found[plain] = weight
    return found


def of_files(stored: StoredTensors) -> Callable[[str], Nf4 | None]:
    """The 4-bit weights of a checkpoint that is stored so."""

    def read(name: str) -> Nf4 | None:
        if name + STATE not in stored:
            return None
        from bitsandbytes.functional import QuantState

        parts = {key: stored[key].read() for key in stored if key.startswith(name + ".")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        nested = state.nested
        return Nf4(
            packed=stored[name].read().view(-1),
            absmax=state.absmax,
            code=state.code,
            n_rows=state.shape[0],
            n_cols=state.shape[1],
            blocksize=state.blocksize,
            nested_absmax=state.state2.absmax if nested else None,
            nested_code=state.state2.code if nested else None,
            offset=state.offset if nested else None,
            nested_blocksize=state.state2.blocksize if nested else NESTED,
        )

    return read


def _state_of(stored: StoredTensors, name: str) -> dict[str, Any] | None:
    """What a checkpoint in 4 bits says of one of its weights; None for a tensor that is not in 4 bits."""
    if name + STATE not in stored:
        return None
    state: dict[str, Any] = json.loads(bytes(stored[name + STATE].read().numpy()))
    return state


def _belongs_to_quantized(name: str) -> bool:
    """A part of a 4-bit weight's state, not a tensor of the model."""
    tail = name.rpartition(".weight.")[2]
    return ".weight." in name and (tail in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
                                   or tail.startswith("quant_state."))  # fmt: skip
