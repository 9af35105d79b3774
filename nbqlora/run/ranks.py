"""This process as one of several that train together: how it joins them, and begins as they do.

Started by ``torchrun``, ``accelerate launch``, a batch script or the notebook's workers, each rank does the whole main
job, with the same rows, plan and model, and its share of every step. What only its own machine knows is exchanged
before it decides anything: how much memory is free and how fast the card is. The plan is then that of the leanest.

A rank sees its own card alone, as card 0, so nothing else in the job has to know which it is.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import cache
from itertools import count
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from nbqlora.core.errors import RunError
from nbqlora.core.ranks import Rank, rank_of, see_one_card, without_signs
from nbqlora.core.specs import DeviceSpec
from nbqlora.core.units import MIB
from nbqlora.memory.probe import card_uuid
from nbqlora.planner.cards import Cards
from nbqlora.run.identity import differences
from nbqlora.run.look import Look
from nbqlora.run.resume import Beginning, plan_facts
from nbqlora.train.ranks import Ranks, rank_in

# As long as one may write a checkpoint to a slow folder, or compile its kernels, while the others wait.
PATIENCE = timedelta(minutes=30)
# What the link is measured with; of several the quickest counts.
MEASURED_BYTES = {"cuda": 64 * MIB, "cpu": 8 * MIB}
ROUNDS = 3
# Each group has names of its own where the ranks meet.
_groups = count()
# Of a group that was joined ahead and that no run has taken over yet: what was ``sys.excepthook`` before.
_ahead: list[Callable[..., Any]] = []


@contextmanager
def joined(environ: MutableMapping[str, str]) -> Iterator[Rank]:
    """Within, this process is one of the group that its environment names; by itself where that names none.

    A group that is there already is used, and stays, unless it was joined ahead.

    Raises:
        RunError: the environment names a group that cannot be, or its cards are not to be had.
    """
    rank, own, hook = rank_of(environ), False, sys.excepthook
    taken = without_signs(environ)
    try:
        if not rank.alone and not dist.is_initialized():
            environ.update(taken)
            _join(rank, environ)
            own = True
            without_signs(environ)
        elif _ahead:
            own, hook = True, _ahead.pop()
        ranks = Ranks(torch.device("cpu"))
        yield rank_in(ranks, rank)
    except BaseException:
        own = own and not torch.cuda.is_available()  # NCCL would wait for those that it was talking with
        raise
    finally:
        if own:
            dist.destroy_process_group()
            sys.excepthook = hook  # torch put one before it that names the rank
        environ.update(taken)


def join_ahead(environ: MutableMapping[str, str]) -> None:
    """Join the group that the next :func:`joined` takes over, and start what it takes to talk: CUDA, NCCL; seconds.

    Raises:
        RunError: as :func:`joined`.
    """
    rank, hook = rank_of(environ), sys.excepthook
    if rank.alone:
        return
    _join(rank, environ)
    _ahead.append(hook)
    # A backend connects when it is used first.
    Ranks(torch.device("cpu")).add_(torch.zeros(1, device="cuda" if torch.cuda.is_available() else "cpu"))


def meet() -> None:
    """Wait until all ranks have come to this call."""
    Ranks(torch.device("cpu")).any(False)


def _join(rank: Rank, environ: MutableMapping[str, str]) -> None:
    see_one_card(rank, environ)
    on_cards = torch.cuda.is_available()
    if on_cards and torch.cuda.device_count() != 1:
        many = f"this rank sees {torch.cuda.device_count()} cards, for CUDA was started before it could choose its own"
        raise RunError(f"{many}; set CUDA_VISIBLE_DEVICES to one card for each rank before anything asks for the cards")
    if on_cards:
        torch.cuda.set_device(0)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cards else "gloo",
        store=dist.PrefixStore(f"nbqlora {next(_groups)}", _meeting_place()),  # type: ignore[attr-defined]
        rank=rank.number,
        world_size=rank.n,
        timeout=PATIENCE,
    )
    if on_cards:
        check_own_cards(Ranks(torch.device("cpu")).gathered((socket.gethostname(), card_uuid(torch.cuda, 0))))


def check_own_cards(cards: Sequence[tuple[str, str]]) -> None:
    """See that each rank has a card of its own; NCCL says it in words of its own, and not before it is used.

    Args:
        cards: of each rank its machine and the card's name there.

    Raises:
        RunError: two have the same.
    """
    for number, card in enumerate(cards):
        first = cards.index(card)
        if first < number:
            both = f"ranks {first} and {number} of {len(cards)} have the same card ({card[1]} of {card[0]})"
            raise RunError(f"{both}; leave CUDA_VISIBLE_DEVICES out, or let it list a card for each process")


@cache
def _meeting_place() -> Any:
    """Where the environment says that the ranks meet; it stays as long as the process, for one run after another."""
    store, _, _ = next(iter(rendezvous("env://", timeout=PATIENCE)))
    return store


def cards_of(rank: Rank) -> Cards:
    """The processes, as a plan sees them."""
    return Cards(per_node=rank.n_local, n_nodes=rank.n_nodes)


def look_together(ranks: Ranks, rank: Rank, fetch: Callable[[], Any], look: Callable[[], Look]) -> Look:
    """Look at model, data and machine on all ranks; the machine is the leanest of them.

    Args:
        fetch: brings the model's files to this machine; by one of its processes, and before the others look.

    Raises:
        RunError: another rank cannot go on.
    """
    if ranks.alone:
        return look()
    link = measured_link(torch.device("cuda" if torch.cuda.is_available() else "cpu"), ranks)
    ranks.all_well(lambda: fetch() if rank.local == 0 else None)
    seen = ranks.all_well(look)
    return replace(seen, device=leanest(ranks.gathered(seen.device), rank, link), cards=cards_of(rank))


def measured_link(device: torch.device, ranks: Ranks) -> float:
    """Bytes a second that each sends in an all-reduce, the same on all.

    What the backend allocates on a card for it is there afterwards, before free memory is read.
    """
    tensor, found = torch.zeros(MEASURED_BYTES[device.type] // 4, device=device), []
    for _ in range(1 + ROUNDS):
        begun = perf_counter()
        ranks.add_(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(perf_counter() - begun)
    slowest = max(ranks.gathered(min(found[1:])))
    return 2 * (ranks.n - 1) / ranks.n * tensor.nbytes / slowest


def leanest(devices: list[DeviceSpec], rank: Rank, link: float) -> DeviceSpec:
    """A machine on which a plan fits all of these."""

    def least(name: str) -> Any:
        values = [getattr(device, name) for device in devices]
        return None if None in values else min(values)

    names = list(dict.fromkeys(device.name for device in devices))
    notes = devices[0].notes
    if len(names) > 1:
        notes = (*notes, f"the ranks have different cards ({', '.join(names)}): planned for the least of each")
    figures = (
        "total_bytes", "free_bytes", "host_free_bytes", "capability", "has_bf16", "has_triton", "matmul_flops",
        "copy_bytes_per_second",
    )  # fmt: skip
    return replace(
        devices[0],
        **{name: least(name) for name in figures},
        context_bytes=max(device.context_bytes for device in devices),
        n_devices=rank.n_local,
        link_bytes_per_second=link,
        notes=notes,
    )


def begun_alike(ranks: Ranks, beginning: Beginning) -> None:
    """See that all ranks are about to do the same.

    Raises:
        RunError: they are not, with what differs; on all of them.
    """
    if ranks.alone:
        return
    step = 0 if beginning.checkpoint is None else beginning.checkpoint.step
    facts = {**plan_facts(beginning.plan), "steps": beginning.plan.total_steps}
    own = json.loads(json.dumps({"checkpoint": step, **beginning.identity, **facts}))
    found = ranks.gathered(own)
    for number, other in enumerate(found):
        if lines := differences(found[0], other):
            told = "\n".join(f"  {line}" for line in lines)
            advice = "give all the same file, data, model and output_dir (a folder that all of them see)"
            raise RunError(f"rank {number} would not do what rank 0 does (0 -> {number}):\n{told}\n  {advice}")
