"""Linears with LoRA as data: what a fused layer needs to know of a module, read once.

A projection is a frozen weight (NF4 or 16 bits), perhaps a bias, perhaps an adapter. Projections that read the same
input (q, k and v; gate and up) form a group: one input, one stacked A.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nbqlora.kernels.nf4 import Nf4, dequantize_nf4


class NotMatchedError(Exception):
    """This module is not one that the fused layer can stand for; the message says why."""


@dataclass(kw_only=True)
class Lora:
    """One adapter: ``y += scale * dropout(x) A^T B^T``.

    Args:
        a: parameter ``[r, n_in]``, fp32.
        b: parameter ``[n_out, r]``, fp32.
        dropout: the module that drops; its ``training`` says whether it does.
    """

    a: torch.nn.Parameter
    b: torch.nn.Parameter
    scale: float
    dropout: torch.nn.Module
    module: Any

    @property
    def r(self) -> int:
        """Rank."""
        return int(self.a.shape[0])

    @property
    def dropout_now(self) -> float:
        """The probability in the module's present mode."""
        return float(getattr(self.dropout, "p", 0.0)) if self.dropout.training else 0.0


@dataclass(kw_only=True)
class Projection:
    """A frozen linear ``[n_out, n_in]`` and its adapter, if it has one."""

    name: str
    weight: Nf4 | torch.Tensor
    bias: torch.Tensor | None
    n_out: int
    n_in: int
    lora: Lora | None

    @property
    def r(self) -> int:
        """Rank of the adapter, 0 without one."""
        return self.lora.r if self.lora else 0


def read_projection(name: str, module: Any) -> Projection:
    """What ``module`` is, bare or wrapped by PEFT.

    Raises:
        NotMatchedError: another kind of module, another variant of LoRA, or a base that trains.
    """
    base, lora = _unwrapped(name, module)
    weight, bias = _weight(name, base), getattr(base, "bias", None)
    if any(p.requires_grad for p in base.parameters()):
        raise NotMatchedError(f"{name} is trained itself")
    return Projection(name=name, weight=weight, bias=bias, n_out=base.out_features, n_in=base.in_features, lora=lora)


def _unwrapped(name: str, module: Any) -> tuple[Any, Lora | None]:
    from peft.tuners.lora import Linear
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(module, LoraLayer):
        return module, None
    kinds: tuple[type, ...] = (Linear,)
    try:
        from peft.tuners.lora.bnb import Linear4bit

        kinds = (Linear, Linear4bit)
    except ImportError:  # bitsandbytes is not installed: no 4-bit modules either
        pass
    if type(module) not in kinds:
        raise NotMatchedError(f"{name} is PEFT's {type(module).__name__}")
    active = [a for a in module.active_adapters if a in module.lora_A]
    if not active:
        return module.base_layer, None
    return module.base_layer, _adapter(name, module, active)


def _adapter(name: str, module: Any, active: Sequence[str]) -> Lora:
    if len(active) > 1:
        raise NotMatchedError(f"{name} has {len(active)} active adapters")
    adapter = active[0]
    if adapter in getattr(module, "lora_variant", {}) or module.use_dora.get(adapter):
        raise NotMatchedError(f"{name} has a variant of LoRA (DoRA or another)")
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if a.bias is not None or b.bias is not None:
        raise NotMatchedError(f"{name} has LoRA with a bias")
    if getattr(module, "fan_in_fan_out", False):
        raise NotMatchedError(f"{name} is stored transposed")
    if a.weight.dtype != torch.float32 or b.weight.dtype != torch.float32:
        raise NotMatchedError(f"the adapter of {name} is in {a.weight.dtype}, not in fp32")
    return Lora(
        a=a.weight,
        b=b.weight,
        scale=float(module.scaling[adapter]),
        dropout=module.lora_dropout[adapter],
        module=module,
    )


def _weight(name: str, base: Any) -> Nf4 | torch.Tensor:
    if type(base) is torch.nn.Linear:
        weight: torch.Tensor = base.weight
        return weight
    if type(base).__module__.startswith("bitsandbytes") and type(base).__name__ == "Linear4bit":
        return _nf4(name, base)
    raise NotMatchedError(f"{name} is a {type(base).__module__.partition('.')[0]} {type(base).__name__}")


def _nf4(name: str, base: Any) -> Nf4:
    state = base.weight.quant_state
    if state is None:
        raise NotMatchedError(f"{name} is not quantized yet")
    if state.quant_type != "nf4" or getattr(state, "packing_format_for_cpu", False):
        raise NotMatchedError(f"{name} is stored as {state.quant_type}, not NF4 in row order")
    nested = state.nested
    return Nf4(
        packed=base.weight.data.view(-1),
        absmax=state.absmax,
        code=state.code,
        n_rows=base.out_features,
        n_cols=base.in_features,
        blocksize=state.blocksize,
        nested_absmax=state.state2.absmax if nested else None,
        nested_code=state.state2.code if nested else None,
        offset=state.offset if nested else None,
        nested_blocksize=state.state2.blocksize if nested else 256,
    )


def unpack(weight: Nf4, out: torch.Tensor, *, extra: torch.Tensor | None = None, extra_at: int = 0) -> None:
    """Write an NF4 weight into ``out [n_out, n_in + width]``; see :func:`dequantize_nf4`.

    On a CPU bitsandbytes' own operator does it: it is compiled, the reference is not.

    Raises:
        RuntimeError: the weight is split over cards, and was not gathered: a kernel would read what lies at address 0.
    """
    if weight.packed.numel() == 0:
        raise RuntimeError(f"a weight of {weight.n_rows} x {weight.n_cols} is used while it is not there")
    if out.is_cuda:
        dequantize_nf4(weight, out, extra=extra, extra_at=extra_at)
        return
    out[:, : weight.n_cols] = _by_bitsandbytes(weight, out.dtype)
    if out.shape[1] > weight.n_cols:
        out[:, weight.n_cols :] = 0
        if extra is not None:
            out[:, weight.n_cols + extra_at : weight.n_cols + extra_at + extra.shape[1]] = extra


def _by_bitsandbytes(weight: Nf4, dtype: torch.dtype) -> torch.Tensor:
    import bitsandbytes  # noqa: F401  registers the operators

    absmax = weight.absmax
    if weight.nested_absmax is not None:
        ops = torch.ops.bitsandbytes
        absmax = ops.dequantize_blockwise(
            absmax, weight.nested_absmax, weight.nested_code, weight.nested_blocksize, torch.float32
        )
        absmax = absmax + weight.offset
    shape = (weight.n_rows, weight.n_cols)
    unpacked: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed.view(-1, 1), absmax, weight.blocksize, "nf4", shape, dtype
    )
    return unpacked
