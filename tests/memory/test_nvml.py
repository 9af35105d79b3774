"""The card through NVML: which one, how full, whose."""

import os
import sys
from collections.abc import Callable

import pytest

from nbqlora.memory.nvml import order_notes, read_card, split_processes, visible_uuids

GIB = 1 << 30
A, B, C = "GPU-aa11", "GPU-aa22", "GPU-bb33"
UseNvml = Callable[..., None]


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, (A, B, C)),
        ("", ()),
        ("-1", ()),
        ("0", (A,)),
        ("2,0", (C, A)),
        (" 1 , 2 ", (B, C)),
        ("0,-1,1", (A,)),
        ("0,7,1", (A,)),
        ("0,0", ()),
        ("GPU-bb", (C,)),
        ("GPU-aa22,GPU-aa11", (B, A)),
        ("GPU-aa", ()),
        ("GPU-zz,GPU-bb33", ()),
        ("MIG-5c89", ("MIG-5c89",)),
        ("NoDevFiles", ()),
    ],
)
def test_cuda_visible_devices(variable: str | None, expected: tuple[str, ...]) -> None:
    assert visible_uuids(variable, [A, B, C]) == expected


@pytest.mark.parametrize(
    ("bytes_of", "expected"),
    [
        ({}, (None, None)),
        ({7: 5}, (5, 0)),
        ({7: 5, 8: 3, 9: 2}, (5, 5)),
        ({8: 3}, (None, 3)),
        ({7: 5, 8: None}, (5, None)),
        ({7: None}, (None, 0)),
    ],
)
def test_processes(bytes_of: dict[int, int | None], expected: tuple[int | None, int | None]) -> None:
    assert split_processes(bytes_of, 7) == expected


def test_order_is_doubted_only_for_cards_of_several_models() -> None:
    note = "cards of several models: CUDA may start on another one; CUDA_DEVICE_ORDER=PCI_BUS_ID settles the order"
    assert order_notes(2, {"A", "B"}, None) == (note,)
    assert order_notes(2, {"A", "B"}, "PCI_BUS_ID") == ()
    assert order_notes(2, {"A"}, None) == ()
    assert order_notes(1, {"A", "B"}, None) == ()


def test_first_visible_card(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {os.getpid(): 3 * GIB, 1: 2 * GIB}
    use_nvml({"uuid": A}, {"uuid": B, "used": 6 * GIB, "processes": others})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    card, why = read_card()
    assert card is not None and why == ""
    assert (card.uuid, card.name, card.n_cards) == (B, "Tesla T4", 1)
    assert (card.own_bytes, card.others_bytes) == (3 * GIB, 2 * GIB)
    # The driver's reserve of 0.25 GiB is no program's memory.
    assert (card.total_bytes, card.used_bytes, card.free_bytes) == (14.75 * GIB, 6 * GIB, 8.75 * GIB)


def test_a_card_by_its_uuid(use_nvml: UseNvml) -> None:
    use_nvml({"uuid": A}, {"uuid": B, "name": "Tesla P4"})
    first, by_uuid = read_card()[0], read_card(B)[0]
    assert first is not None and by_uuid is not None
    assert (first.uuid, len(first.notes)) == (A, 1)
    assert (by_uuid.uuid, by_uuid.name, by_uuid.notes) == (B, "Tesla P4", ())
    assert read_card("GPU-none") == (None, "NVML: Not Found")


def test_an_older_library_counts_the_reserve_as_used(use_nvml: UseNvml) -> None:
    use_nvml({"uuid": A, "used": GIB}, has_v2=False)
    card, _ = read_card()
    assert card is not None
    assert (card.total_bytes, card.used_bytes) == (15 * GIB, 1.25 * GIB)


def test_why_there_is_no_card(use_nvml: UseNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    use_nvml()
    assert read_card() == (None, "NVML knows no card")
    use_nvml(init_error="Driver Not Loaded")
    assert read_card() == (None, "NVML: Driver Not Loaded")
    use_nvml({"uuid": A})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert read_card() == (None, "CUDA_VISIBLE_DEVICES hides every card")
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_card() == (None, "nvidia-ml-py is not installed")


def test_the_real_library_on_this_machine() -> None:
    card, why = read_card()
    assert (card is None) == bool(why)
