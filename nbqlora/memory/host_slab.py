"""Inputs of layers that offload: one block of host memory, filled in the forward and read back in the backward.

The block is allocated once, of the exact size, and pinned by registering it with CUDA: torch's own pinned allocator
rounds up to a power of two, which makes 16 GiB of the 9 that a long context needs, on machines that have 12. Where the
system refuses to pin it, copies are made from ordinary memory: the values are the same, and each copy waits.

Copies run on a stream of their own. In the forward a layer's input leaves while the layer computes, and its memory on
the card is let go when the next layer begins; in the backward the next input comes while the present layer computes. So
at most two inputs are on the card in the backward, and one more than without offload for a moment of the forward.

Everything here may be captured into a graph: a copy that is under way is joined before a capture ends
(:meth:`HostSlab.settle`), and addresses stay what they are until :meth:`HostSlab.free`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class _Coming:
    """An input on its way back."""

    x: torch.Tensor
    arrived: torch.cuda.Event | None


@dataclass
class HostSlab:
    """Host memory for ``n_slots`` inputs.

    Args:
        n_slots: layers that offload.
        slot_bytes: the largest input, ``tokens * d_model * itemsize``.
        device: where the layers are.
    """

    n_slots: int
    slot_bytes: int
    device: torch.device
    pinned: bool = field(default=False, init=False)
    _block: torch.Tensor | None = field(default=None, init=False, repr=False)
    _stream: torch.cuda.Stream | None = field(default=None, init=False, repr=False)
    _leaving: list[tuple[torch.Tensor, torch.cuda.Event]] = field(default_factory=list, init=False, repr=False)
    _coming: dict[int, _Coming] = field(default_factory=dict, init=False, repr=False)
    _shapes: dict[int, tuple[torch.Size, torch.dtype]] = field(default_factory=dict, init=False, repr=False)

    @property
    def n_bytes(self) -> int:
        """What the block takes."""
        return self.n_slots * self.slot_bytes

    def allocate(self) -> None:
        """Take the memory, and pin it where there is a card; the first :meth:`store` does it otherwise.

        Raises:
            MemoryError: the host does not have it.
        """
        if self._block is not None:
            return
        try:
            self._block = torch.empty(self.n_bytes, dtype=torch.uint8)
        except RuntimeError as error:
            raise MemoryError(f"{self.n_bytes} bytes of host memory for the inputs of {self.n_slots} layers") from error
        if self.device.type == "cuda" and self.n_bytes:
            self._stream = torch.cuda.Stream(self.device)
            found = torch.cuda.cudart().cudaHostRegister(self._block.data_ptr(), self.n_bytes, 0)
            self.pinned = int(found) == 0

    def store(self, slot: int, x: torch.Tensor) -> None:
        """Send ``x`` to its slot; it may be dropped at once.

        Raises:
            ValueError: it is larger than a slot.
        """
        if x.nbytes > self.slot_bytes:
            raise ValueError(f"an input of {x.nbytes} bytes; a slot was made for {self.slot_bytes}")
        self.allocate()
        self.settle()
        self._shapes[slot] = (x.shape, x.dtype)
        self._coming.pop(slot, None)
        place = self._place(slot)
        if self._stream is None:
            place.copy_(x)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            place.copy_(x, non_blocking=self.pinned)
            self._leaving.append((x, self._stream.record_event()))

    def settle(self) -> None:
        """What is leaving has left, for all that comes later on the present stream."""
        for _, left in self._leaving:
            torch.cuda.current_stream(self.device).wait_event(left)
        self._leaving.clear()

    def prefetch(self, slot: int) -> None:
        """Begin to bring an input back; nothing where there is none or it is on its way."""
        if slot in self._coming or slot not in self._shapes:
            return
        shape, dtype = self._shapes[slot]
        x = torch.empty(shape, dtype=dtype, device=self.device)
        if self._stream is None:
            x.copy_(self._place(slot))
            self._coming[slot] = _Coming(x, None)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            x.copy_(self._place(slot), non_blocking=self.pinned)
            self._coming[slot] = _Coming(x, self._stream.record_event())

    def take(self, slot: int, *, more: bool = True) -> torch.Tensor:
        """The input of a slot, on the card, for the present stream.

        Args:
            more: the input of the slot below will be asked for next, and may set out.
        """
        self.prefetch(slot)
        coming = self._coming.pop(slot)
        if coming.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(coming.arrived)
        if more:
            self.prefetch(slot - 1)
        return coming.x

    def forget(self) -> None:
        """Drop what is under way: a step was given up, perhaps in the middle of its capture."""
        if self._stream is not None and self._is_captured() == torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        self._leaving.clear()
        self._coming.clear()
        self._shapes.clear()

    def free(self) -> None:
        """Give the memory back."""
        if self._block is None:
            return
        self.forget()
        if self.pinned:
            torch.cuda.synchronize(self.device)
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._stream, self.pinned = None, None, False

    def __del__(self) -> None:
        self.free()

    def _is_captured(self) -> bool:
        """Whether the copies' stream is part of a capture."""
        with torch.cuda.stream(self._stream):
            return torch.cuda.is_current_stream_capturing()

    def _place(self, slot: int) -> torch.Tensor:
        assert self._block is not None
        shape, dtype = self._shapes[slot]
        begin = slot * self.slot_bytes
        return self._block[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape)
