"""Inputs that leave for the host come back as they were; on a CPU, where there is no stream to wait for."""

from __future__ import annotations

import pytest
import torch

from nbqlora.memory.host_slab import HostSlab

CPU = torch.device("cpu")


def slab(n_slots: int = 3, slot_bytes: int = 4 * 64) -> HostSlab:
    return HostSlab(n_slots, slot_bytes, CPU)


def test_what_was_stored_is_what_comes_back_whatever_becomes_of_the_tensor() -> None:
    host = slab()
    xs = [torch.randn(8, 8), torch.randn(4, 8), torch.randn(16, 8, dtype=torch.float64)[:4]]
    expected = [x.clone() for x in xs]
    for slot, x in enumerate(xs):
        host.store(slot, x)
        x.zero_()
    for slot in (2, 1, 0):
        found = host.take(slot, more=slot > 0)
        assert found.dtype == expected[slot].dtype and torch.equal(found, expected[slot])


def test_a_slot_is_written_anew_even_if_its_input_had_set_out_to_come_back() -> None:
    host = slab(2)
    old, new = torch.randn(8, 8), torch.randn(8, 8)
    host.store(0, old)
    host.store(1, old)
    host.take(1)  # slot 0 comes along
    host.store(0, new)
    assert torch.equal(host.take(0, more=False), new)


def test_an_input_that_is_too_large_is_an_error() -> None:
    with pytest.raises(ValueError, match="an input of 512 bytes; a slot was made for 256"):
        slab().store(0, torch.zeros(16, 8))


def test_the_block_is_taken_once_and_given_back() -> None:
    host = slab()
    assert host.n_bytes == 3 * 256 and host._block is None
    host.allocate()
    address = host._block.data_ptr()
    host.store(1, torch.ones(8, 8))
    assert host._block.data_ptr() == address and host._block.nbytes == host.n_bytes
    host.free()
    host.free()
    assert host._block is None
    host.store(1, torch.ones(8, 8))  # and taken again where it is needed again


def test_a_step_that_was_given_up_leaves_nothing_behind() -> None:
    host = slab(2)
    host.store(0, torch.ones(8, 8))
    host.store(1, torch.ones(8, 8))
    host.take(1)
    host.forget()
    assert not host._coming and not host._shapes
    with pytest.raises(KeyError):
        host.take(0)


def test_memory_that_the_host_does_not_have_is_a_memory_error() -> None:
    with pytest.raises(MemoryError, match="of host memory for the inputs of 4 layers"):
        HostSlab(4, 1 << 60, CPU).allocate()
