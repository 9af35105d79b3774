"""The one scratch buffer that weights are unpacked into: an object with an owner, never a global.

A 4-bit weight exists in 16 bits only while its product runs, so one buffer as large as the largest weight serves all of
them. Peers allocate it anew for each backward product; here the allocator is never asked while a step runs.

A buffer belongs to one stream: two streams that shared it would overwrite each other's weight. A stream that
is being captured into a graph writes where the arena's own stream does, because a replay runs in its place. What
:meth:`take` returns is valid until the next call on the same stream, and nobody keeps it.
"""

from __future__ import annotations

import torch


class DequantArena:
    """Scratch memory of one device, one buffer a stream.

    Args:
        device: where the weights are.
        n_bytes: size of the largest weight, unpacked, with what a product appends to it.
    """

    def __init__(self, device: torch.device, n_bytes: int) -> None:
        self.device, self.n_bytes = device, n_bytes
        self._buffers: dict[int, torch.Tensor] = {}
        self._own_stream = self._stream()

    def __repr__(self) -> str:
        return f"DequantArena({self.n_bytes / 2**20:.1f} MiB a stream on {self.device}, {len(self._buffers)} in use)"

    def take(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """``[rows, columns]`` of the current stream's buffer, its contents undefined.

        Raises:
            ValueError: it is larger than the largest weight that the arena was made for.
        """
        asked = rows * columns * dtype.itemsize
        if asked > self.n_bytes:
            raise ValueError(
                f"{rows} x {columns} in {dtype} takes {asked} bytes; the arena was made for {self.n_bytes}"
            )
        return self._buffer()[:asked].view(dtype).view(rows, columns)

    def free(self) -> None:
        """Give the memory back; the next :meth:`take` allocates again."""
        self._buffers.clear()

    @property
    def held_bytes(self) -> int:
        """What the arena holds now."""
        return len(self._buffers) * self.n_bytes

    def _stream(self) -> int:
        return int(torch.cuda.current_stream(self.device).cuda_stream) if self.device.type == "cuda" else 0

    def _buffer(self) -> torch.Tensor:
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        stream = self._own_stream if capturing else self._stream()
        found = self._buffers.get(stream)
        if found is None:
            found = self._buffers[stream] = torch.empty(self.n_bytes, dtype=torch.uint8, device=self.device)
        return found
