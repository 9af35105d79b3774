"""All adapter parameters as views of one flat buffer, their gradients as views of another.

An 8B model has 448 adapter matrices. As tensors of their own they cost 448 casts, 448 additions into ``.grad`` and an
optimizer that launches for each; as views of one buffer they cost one cast, none and one. PEFT's parameters stay
what they are, with their names and files: only their storage is shared.

Masters and gradients are fp32. Products run in the model's dtype, so a copy in that dtype is made once a forward. The A
matrices of projections that share an input lie next to each other: the stacked A is a view.

Some things take the views apart (``.to(dtype)``, ``zero_grad(set_to_none=True)``): every forward looks, and puts
parameters and gradients back.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Elements between the beginnings of two groups: 128 bytes in half precision, as cuBLAS's fastest kernels like it.
ALIGNED = 64


class FlatAdapters:
    """Owner of the buffers.

    Args:
        parameters: fp32, one device; neighbours in this order lie next to each other where ``adjacent``.
        adjacent: whether each parameter begins right behind the one before it.
        dtype: of the products.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], adjacent: Sequence[bool], dtype: torch.dtype) -> None:
        self.parameters = tuple(parameters)
        self.dtype = dtype
        self._offset: dict[int, int] = {}
        end = 0
        for parameter, beside in zip(self.parameters, adjacent, strict=True):
            begin = end if beside else -(-end // ALIGNED) * ALIGNED
            self._offset[id(parameter)] = begin
            end = begin + parameter.numel()
        device = self.parameters[0].device
        self.master = torch.zeros(end, dtype=torch.float32, device=device)
        self.gradient: torch.Tensor | None = None
        self._gradient_views: list[torch.Tensor] = []
        self._copy = self.master if dtype == torch.float32 else torch.empty(end, dtype=dtype, device=device)
        self._attach()
        self.refresh()

    def __contains__(self, parameter: torch.nn.Parameter) -> bool:
        return id(parameter) in self._offset

    def __repr__(self) -> str:
        return f"FlatAdapters({len(self.parameters)} matrices, {self.master.numel():,} elements)"

    def view(self, buffer: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter's part of a flat buffer, in its shape."""
        begin = self._offset[id(parameter)]
        return buffer[begin : begin + parameter.numel()].view(parameter.shape)

    def copy_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The parameter in the products' dtype."""
        return self.view(self._copy, parameter)

    def stacked_copy(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Neighbouring A matrices as one, ``[sum of ranks, n_in]``, in the products' dtype."""
        return self._stacked(self._copy, parameters)

    def stacked_gradient(self, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        """Their gradients as one, fp32."""
        return self._stacked(self._gradient(), parameters)

    def gradient_of(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """The gradient, fp32, to be added to."""
        return self.view(self._gradient(), parameter)

    def refresh_views(self) -> None:
        """Put back parameters that something gave storage of their own."""
        if any(p.data_ptr() != self._address(p) for p in self.parameters):
            self._attach()

    def refresh(self) -> None:
        """Before a forward: views where they belong, and a fresh copy in the products' dtype."""
        self.refresh_views()
        if self._copy is not self.master:
            self._copy.copy_(self.master)

    def begin_gradients(self) -> None:
        """Before a backward: every ``.grad`` is a view; those that were not there begin at zero."""
        gradient, views = self._gradient(), self._gradient_views
        missing = [p.grad is None for p in self.parameters]
        if all(missing):
            gradient.zero_()
            for parameter, own in zip(self.parameters, views, strict=True):
                parameter.grad = own
            return
        for parameter, own, new in zip(self.parameters, views, missing, strict=True):
            if new:
                own.zero_()
            elif parameter.grad is not own and parameter.grad.data_ptr() != own.data_ptr():  # type: ignore[union-attr]
                own.copy_(parameter.grad)  # type: ignore[arg-type]
            parameter.grad = own

    def clear_gradients(self, set_to_none: bool = True) -> None:
        """As ``zero_grad`` of a model or an optimizer, for these parameters."""
        if not set_to_none:
            self._gradient().zero_()
            return
        for parameter in self.parameters:
            parameter.grad = None

    def all_gradients(self) -> torch.Tensor:
        """The flat gradient buffer, fp32."""
        return self._gradient()

    def gathered(self) -> torch.Tensor | None:
        """The flat gradient with whatever stands in ``.grad`` in it; None when no parameter has one."""
        if all(p.grad is None for p in self.parameters):
            return None
        self.begin_gradients()
        return self._gradient()

    def has_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> bool:
        """Whether each of these has its view as ``.grad``."""
        if self.gradient is None:
            return False
        base = self.gradient.data_ptr()
        return all(p.grad is not None and p.grad.data_ptr() == base + 4 * self._offset[id(p)] for p in parameters)

    def release(self) -> None:
        """Give the parameters storage of their own again, and drop the buffers."""
        for parameter in self.parameters:
            parameter.data = parameter.data.clone()
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Let go of the gradient buffer; the next backward makes it anew."""
        self.gradient, self._gradient_views = None, []

    def _address(self, parameter: torch.nn.Parameter) -> int:
        return self.master.data_ptr() + 4 * self._offset[id(parameter)]

    def _attach(self) -> None:
        for parameter in self.parameters:
            own = self.view(self.master, parameter)
            if parameter.data_ptr() != own.data_ptr():
                own.copy_(parameter.data)
                parameter.data = own

    def _gradient(self) -> torch.Tensor:
        if self.gradient is None:
            self.gradient = torch.zeros_like(self.master)
            self._gradient_views = [self.view(self.gradient, p) for p in self.parameters]
        return self.gradient

    def _stacked(self, buffer: torch.Tensor, parameters: Sequence[torch.nn.Parameter]) -> torch.Tensor:
        begin = self._offset[id(parameters[0])]
        rows = sum(p.shape[0] for p in parameters)
        width = parameters[0].shape[1]
        return buffer[begin : begin + rows * width].view(rows, width)
