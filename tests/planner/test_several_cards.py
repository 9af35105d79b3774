"""Plans for several cards: the same effective batch, each card's memory, what is sent, and a card that is idle."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nbqlora.core.errors import ConfigError, DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, MemoryCategory
from nbqlora.planner import make_plan
from nbqlora.planner.cards import Cards, cards_asked
from nbqlora.planner.standing import adapter_params
from tests.planner.shapes import DEVICES, GIB, MODELS, cpu, options, plan, rows_of

PAIR = replace(DEVICES["T4"], n_devices=2)
NVLINKED = replace(DEVICES["H100"], name="NVIDIA H100 80GB HBM3", n_devices=8)


def row(found: Plan) -> tuple[str, str]:
    (decision,) = [d for d in found.decisions if d.name == "cards"]
    return decision.value, decision.because


def test_two_cards_take_half_of_a_step_each() -> None:
    one, two = plan("1B", PAIR, gpus=1), plan("1B", PAIR, gpus=2)
    assert (two.n_cards, two.n_nodes, two.effective_batch_size, two.total_steps) == (2, 1, 16, one.total_steps)
    assert two.micro_batch_size * two.gradient_accumulation_steps == 8
    n = adapter_params(MODELS["1B"], options())
    assert two.sent_bytes == 4 * n
    assert row(two) == (
        "2 x Tesla T4",
        "8 of a step's 16 rows on each; 0.04 GiB sent, 4.51 ms a step (not measured; 10 GB/s are assumed, as PCIe has)",
    )
    assert one.step_seconds is not None and two.step_seconds is not None
    assert 0.5 < two.step_seconds / one.step_seconds < 0.6


def test_all_are_as_many_as_there_are() -> None:
    assert plan("1B", NVLINKED, gpus="all").n_cards == 8
    assert cards_asked(options(gpus="all"), PAIR, 3) == Cards(per_node=2, n_nodes=3)
    assert cards_asked(options(), PAIR).n == 1


def test_what_a_ring_sends_grows_to_twice_the_gradients() -> None:
    n = adapter_params(MODELS["8B"], options())
    sent = [plan("8B", NVLINKED, gpus=n_cards).sent_bytes for n_cards in (1, 2, 4, 8)]
    assert sent == [int(2 * share * 4 * n) for share in (0, 1 / 2, 3 / 4, 7 / 8)]


@pytest.mark.parametrize(
    ("device", "cards", "words"),
    [
        (NVLINKED, Cards(per_node=2), "0.559 ms a step (not measured; 300 GB/s are assumed, as NVLink has)"),
        (DEVICES["laptop"], Cards(per_node=2), "(not measured; 20 GB/s are assumed, as PCIe has)"),
        (replace(PAIR, link_bytes_per_second=4e9), Cards(per_node=2), "41.9 ms a step (measured 4 GB/s)"),
        (replace(NVLINKED, name="NVIDIA H100 PCIe"), Cards(per_node=2),
         "8.39 ms a step (not measured; 20 GB/s are assumed, as PCIe has)"),
        (NVLINKED, Cards(per_node=8, n_nodes=2),
         "(how fast the network between the machines is, is not known; 1.25 GB/s are assumed)"),
    ],
)  # fmt: skip
def test_over_which_link(device: object, cards: Cards, words: str) -> None:
    config = options(max_length=512, effective_batch_size=32)
    found = make_plan(config, MODELS["8B"], device, rows_of(512), output_dir="r", cards=cards)  # type: ignore[arg-type]
    assert row(found)[1].endswith(words)


def test_more_machines() -> None:
    config = options(effective_batch_size=32)
    found = make_plan(config, MODELS["8B"], NVLINKED, rows_of(), output_dir="r", cards=Cards(per_node=8, n_nodes=2))
    assert (found.n_cards, found.n_nodes, found.effective_batch_size) == (16, 2, 32)
    assert found.micro_batch_size * found.gradient_accumulation_steps == 2
    value, because = row(found)
    assert value == "2 machines of 8 x NVIDIA H100 80GB HBM3"
    assert because.startswith("2 of a step's 32 rows on each; ")


def test_cards_that_do_not_divide_the_batch_keep_it() -> None:
    found = plan("1B", PAIR, gpus=3)
    assert found.effective_batch_size == 16
    assert found.micro_batch_size * found.gradient_accumulation_steps == 6
    assert row(found)[1].startswith("5 or 6 of a step's 16 rows on each, so some wait; ")
    data = replace(rows_of(packs=300), layout=BatchLayout.PACKED)
    packs = make_plan(options(gpus=2), MODELS["1B"], PAIR, data, output_dir="r")
    assert packs.effective_batch_size == 5
    assert row(packs)[1].startswith("2 or 3 of a step's 5 packs on each, so some wait; ")


def test_what_is_pinned_is_a_cards() -> None:
    found = plan("1B", PAIR, gpus=2, per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert (found.micro_batch_size, found.gradient_accumulation_steps, found.effective_batch_size) == (2, 3, 12)
    found = plan("1B", PAIR, gpus=2, per_device_train_batch_size=4)
    assert (found.micro_batch_size, found.gradient_accumulation_steps, found.effective_batch_size) == (4, 2, 16)
    found = plan("1B", PAIR, gpus=2, per_device_train_batch_size=16)
    assert (found.micro_batch_size, found.gradient_accumulation_steps, found.effective_batch_size) == (16, 1, 16)


def test_what_cannot_be_with_all_cards_is_a_problem() -> None:
    pinned = {"effective_batch_size": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
    with pytest.raises(
        ConfigError, match="2 cards x 2 rows x 8 accumulation steps = 32, but effective_batch_size is 16"
    ):
        plan("1B", PAIR, gpus="all", **pinned)
    with pytest.raises(ConfigError, match="3 does not divide 8; effective_batch_size is 16, so 8 on each of 2 cards"):
        plan("1B", PAIR, gpus=2, effective_batch_size=16, per_device_train_batch_size=3)


def test_an_idle_card_is_named_with_what_it_would_bring() -> None:
    found = plan("8B", PAIR, n=2000)
    value, because = row(found)
    assert value == "1 of 2"
    both = plan("8B", PAIR, n=2000, gpus=2)
    assert found.step_seconds is not None and both.step_seconds is not None
    minutes = [round(p.total_steps * (p.step_seconds or 0) / 60) for p in (both, found)]
    took, would = (f"{m // 60} h {m % 60:02d} min" if m >= 90 else f"{m} min" for m in reversed(minutes))
    assert because == f"1 more Tesla T4 is idle; gpus = 2 would take about {would} instead of {took}"
    assert minutes[0] < 0.6 * minutes[1]


def test_an_idle_card_of_unknown_speed() -> None:
    found = plan("1B", replace(NVLINKED, matmul_flops=None))
    assert row(found)[1] == "7 more NVIDIA H100 80GB HBM3 are idle; gpus = 8 would use all"
    assert not [d for d in plan("1B", DEVICES["T4"]).decisions if d.name == "cards"]


def test_processes_on_a_cpu_share_its_memory() -> None:
    machine = cpu(8)
    one, two = plan("1B", machine), plan("1B", machine, gpus=2)
    assert row(two)[0] == "2 processes"
    free = machine.free_bytes
    assert one.usable_bytes - two.usable_bytes == free - free // 2
    assert two.budget.by_category[MemoryCategory.WEIGHTS] == one.budget.by_category[MemoryCategory.WEIGHTS]


def test_cards_share_the_hosts_memory() -> None:
    host = replace(PAIR, host_free_bytes=20 * GIB)
    allowed = [plan("13B", host, tokens=4096, gpus=n, effective_batch_size=2, ram_gib=20) for n in (1, 2)]
    assert all(found.host_bytes <= 20 * GIB // found.n_cards for found in allowed)


def test_a_model_that_fits_is_whole_on_each_card() -> None:
    found = plan("8B", PAIR, gpus=2)
    assert (found.shards, found.gathered_bytes) == (1, 0)
    assert found.budget == plan("8B", DEVICES["T4"], per_device_train_batch_size=found.micro_batch_size).budget
    with pytest.raises(DoesNotFitError) as caught:
        plan("70B", DEVICES["T4"])
    assert "card" not in str(caught.value).splitlines()[-1]
