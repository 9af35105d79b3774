"""Config, model, machine and data -> a plan: which batch, what each layer keeps, and why.

Memory is counted tensor by tensor: a fused layer's in ``fused`` and ``walk``, a stack of them in ``moments`` and
``fused_memory``; transformers' own layers in ``layer`` and ``stock``. Among the splits of ``effective_batch_size``, the
numbers of layers that keep all, all but their MLP's, their input here or on the host, or nothing, and MLPs in tiles,
the fastest that fits card and host wins. Pure arithmetic: any machine can be planned for on any machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, DoesNotFitError
from nbqlora.core.plan import Decision, Plan
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.planner import cards as several
from nbqlora.planner import embedding, explain, saving, shards, split, told
from nbqlora.planner.advice import does_not_fit, least_of
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.cards import Cards
from nbqlora.planner.limits import Limits, usable_bytes
from nbqlora.planner.more_cards import Misfit
from nbqlora.planner.search import candidates, longest_row, step_rows
from nbqlora.planner.standing import choose_dtype, quantized

Notes = tuple[str, ...]


def total_steps(config: FinetuneConfig, n_sequences: int, rows: int, accumulation: int = 1) -> int:
    """Optimizer steps, as Trainer counts them: an epoch's last step may hold fewer rows."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(math.ceil(n_sequences / rows) / accumulation))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What is planned for.

    Args:
        config: with ``gpus`` as a number.
        device: one of the cards, with its whole machine's memory.
        cards: what trains together.
    """

    config: FinetuneConfig
    model: ModelSpec
    device: DeviceSpec
    data: DataStats
    cards: Cards

    @property
    def machine(self) -> DeviceSpec:
        """One card's share of the machine."""
        return several.shared(self.device, self.cards)

    @property
    def dtype(self) -> str:
        """Of the arithmetic."""
        return choose_dtype(self.config.dtype, self.device)

    def on(self, cards: Cards) -> _Asked:
        """The same on other cards. Raises :class:`ConfigError`: what is pinned does not make the batch on those."""
        return replace(self, config=replace(self.config, gpus=cards.n), cards=cards)


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What was found.

    Args:
        config: with ``fsdp`` decided.
        model: with its embedding's place decided.
        limits: what was left for tensors and inputs.
        ranked: the ways to run that were looked at, the best first.
        best: the one that is taken.
    """

    config: FinetuneConfig
    model: ModelSpec
    limits: Limits
    ranked: list[Candidate]
    best: Candidate


def _choose(asked: _Asked) -> _Chosen | None:
    """The best way to run; None where none fits.

    Weights are split over cards only where nothing else fits or ``fsdp`` says so; so do inputs go to the host, with
    ``ram_gib``: how fast a card's copies are is a guess. Before weights are split, the embedding goes there.
    """
    machine, dtype = asked.machine, asked.dtype
    for config in split.ways(asked.config, asked.model):
        for model, limits in embedding.ways(config, asked.model, machine, dtype, longest_row(config, asked.data)):
            tried = [limits] if config.ram_gib is not None else [replace(limits, host_bytes=0), limits]
            for within in tried:
                ranked = candidates(config, model, machine, asked.data, dtype, within)
                best = next((x for x in ranked if within.fit(x)), None)
                if best is not None:
                    return _Chosen(config=config, model=model, limits=limits, ranked=ranked, best=best)
    return None


def make_plan(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    data: DataStats,
    *,
    output_dir: str,
    notes: Notes = (),
    cards: Cards | None = None,
) -> Plan:
    """Decide everything; nothing is loaded or allocated.

    Args:
        device: of one card; the others are like it.
        notes: what the caller knows and the plan should say.
        cards: what trains together; None for what ``gpus`` says.

    Raises:
        ConfigError: ``gradient_checkpointing`` names another number of layers than the model has, what was asked for a
            card does not make the effective batch, or ``fsdp = true`` where weights cannot be split.
        DoesNotFitError: nothing fits, with the smallest change that would.
    """
    cards = cards or several.cards_asked(config, device)
    config = replace(config, gpus=cards.n)
    asked = _Asked(config=config, model=model, device=device, data=data, cards=cards)
    chosen = _choose(asked)
    if chosen is None:
        leanest, limits = _leanest_way(asked)
        why = does_not_fit(config, leanest, asked.machine, data, asked.dtype, limits)
        misfit = Misfit(config=config, model=leanest, device=device, data=data, dtype=asked.dtype, cards=cards)
        raise DoesNotFitError("\n".join([why, *(f"  {line}" for line in misfit.lines())]))
    plan = _planned(asked, chosen, output_dir, notes)
    told_first = _about_cards(asked, chosen, plan)
    if plan.offload_embedding:
        told_first.append(embedding.decision(model, plan.dtype))
    return replace(plan, decisions=(*told_first, *plan.decisions))


def _leanest_way(asked: _Asked) -> tuple[ModelSpec, Limits]:
    """Where nothing fits: the first that the card has room for, as the host is short; else what takes the least."""
    config, model, machine, dtype = asked.config, asked.model, asked.machine, asked.dtype
    ways = [*embedding.ways(config, model, machine, dtype, longest_row(config, asked.data))]
    least = [least_of(config, way, machine, asked.data, dtype).budget.total_bytes for way, _ in ways]
    room = next((n for n, (_, limits) in enumerate(ways) if least[n] <= limits.device_bytes), None)
    return ways[least.index(min(least)) if room is None else room]


def _planned(asked: _Asked, chosen: _Chosen, output_dir: str, notes: Notes) -> Plan:
    """What was chosen, with its reasons; the cards' are not among them yet."""
    config, model, device, data, dtype = chosen.config, chosen.model, asked.device, asked.data, asked.dtype
    best, cards, limits, of_step = chosen.best, asked.cards, chosen.limits, step_rows(chosen.config, asked.data)
    steps, send = total_steps(config, data.n_sequences, of_step), several.sent(config, model, device, cards)
    needs, n_shards = saving.saving_needs(config, model, on_card=device.kind == "cuda"), shards.shards_of(config)
    known = [*notes, *told.notes(config, model, device, data, dtype, steps), *split.notes(config, model, device)]
    return Plan(
        model=asked.model,
        device=device,
        data=data,
        dtype=dtype,
        load_in_4bit=quantized(model, config),
        micro_batch_size=best.micro_batch_size,
        gradient_accumulation_steps=best.accumulation,
        max_length=config.max_length,
        layer_policies=best.mix.policies,
        loss_chunk_tokens=best.loss_chunk_tokens,
        total_steps=steps,
        step_seconds=None if best.step_seconds is None else best.step_seconds + send.seconds,
        usable_bytes=usable_bytes(config, asked.machine),
        budget=best.budget,
        output_dir=output_dir,
        disk_bytes=needs.adapter_bytes,
        n_cards=cards.n,
        n_nodes=cards.n_nodes,
        shards=n_shards,
        step_rows=of_step,
        sent_bytes=send.n_bytes,
        gathered_bytes=shards.step_bytes(model, n_shards, best.accumulation),
        mlp_tile_tokens=best.mix.tile_tokens,
        offload_embedding=model.embedding_on_host,
        host_bytes=best.host_bytes,
        saving=needs,
        decisions=explain.decisions(
            config, model, asked.machine, data, dtype, chosen.ranked, best, limits, cards.per_node
        ),
        notes=(*known, *saving.notes(needs, device, model, saving.rooms_of(device, output_dir))),
        unknowns=told.unknowns(config, model, device, best.mix),
    )


def _about_cards(asked: _Asked, chosen: _Chosen, plan: Plan) -> list[Decision]:
    """How cards share the rows and the weights, or what those would bring that are idle."""
    model, device, data, cards = asked.model, asked.device, asked.data, asked.cards
    if cards.n == 1:
        is_idle = device.kind == "cuda" and device.n_devices > 1
        return [several.idle(device, plan, _seconds_with_all(asked))] if is_idle else []
    send = several.sent(chosen.config, model, device, cards)
    found = [several.decision(device, data, cards, plan.step_rows, send)]
    if plan.shards > 1:
        machine, whole = asked.machine, replace(chosen.config, fsdp=False)
        needed = least_of(whole, model, machine, data, plan.dtype).budget.total_bytes
        pinned = asked.config.fsdp is True
        found.append(split.decision(chosen.config, model, chosen.best, needed, pinned=pinned))
    return found


def _seconds_with_all(asked: _Asked) -> float | None:
    """Seconds of a step on all cards of the machine; None where that is not known."""
    cards = Cards(per_node=asked.device.n_devices)
    try:
        every = asked.on(cards)
    except ConfigError:  # what was asked for of one card does not make the batch on several
        return None
    chosen = _choose(every)
    if chosen is None or chosen.best.step_seconds is None:
        return None
    return chosen.best.step_seconds + several.sent(every.config, asked.model, asked.device, cards).seconds
