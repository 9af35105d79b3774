"""The scratch buffer that weights are unpacked into."""

from __future__ import annotations

import pytest
import torch

from nbqlora.memory.arena import DequantArena

CPU = torch.device("cpu")


def test_one_buffer_serves_every_shape_and_dtype() -> None:
    arena = DequantArena(CPU, 1024)
    assert arena.held_bytes == 0, "nothing is allocated before it is needed"
    first = arena.take(4, 8, torch.float32)
    assert first.shape == (4, 8) and first.dtype == torch.float32
    assert arena.take(16, 32, torch.bfloat16).data_ptr() == first.data_ptr()
    assert arena.held_bytes == 1024


def test_more_than_the_largest_weight_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^17 x 32 in torch.bfloat16 takes 1088 bytes; the arena was made for 1024$"):
        DequantArena(CPU, 1024).take(17, 32, torch.bfloat16)


def test_two_arenas_share_nothing_and_free_gives_back() -> None:
    one, other = DequantArena(CPU, 256), DequantArena(CPU, 256)
    one.take(8, 8, torch.float32).fill_(1.0)
    other.take(8, 8, torch.float32).fill_(2.0)
    assert (one.take(8, 8, torch.float32) == 1.0).all()
    one.free()
    assert one.held_bytes == 0 and other.held_bytes == 256
