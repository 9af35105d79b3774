"""Config, model, machine and data -> a plan: which batch, what each layer keeps, and why.

Memory is counted tensor by tensor: a fused layer's in ``fused`` and ``walk``, a stack of them in ``moments`` and
``fused_memory``; transformers' own layers in ``layer`` and ``stock``. Among the splits of ``effective_batch_size``, the
numbers of layers that keep all, all but their MLP's, their input here or on the host, or nothing, and MLPs in tiles,
the fastest that fits card and host wins. Pure arithmetic: any machine can be planned for on any machine.
"""

from __future__ import annotations

import math
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.planner import cards as several
from nbqlora.planner import explain, saving, told
from nbqlora.planner.advice import does_not_fit
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.cards import Cards
from nbqlora.planner.limits import Limits, limits_of
from nbqlora.planner.search import candidates, step_rows
from nbqlora.planner.standing import choose_dtype, quantized

Notes = tuple[str, ...]


def total_steps(config: FinetuneConfig, n_sequences: int, rows: int, accumulation: int = 1) -> int:
    """Optimizer steps, as Trainer counts them: an epoch's last step may hold fewer rows."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(math.ceil(n_sequences / rows) / accumulation))


def _chosen(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str, limits: Limits
) -> tuple[list[Candidate], Candidate | None]:
    """The ways to run, the best first, and the one that is taken; None where none fits.

    Inputs go to the host only where ``ram_gib`` says so, or nothing else fits: how fast a card's copies are is a guess.
    """
    tried = [limits] if config.ram_gib is not None else [replace(limits, host_bytes=0), limits]
    ranked: list[Candidate] = []
    for within in tried:
        ranked = candidates(config, model, device, data, dtype, within)
        best = next((x for x in ranked if within.fit(x)), None)
        if best is not None:
            return ranked, best
    return ranked, None


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
        ConfigError: ``gradient_checkpointing`` names another number of layers than the model has, or what was asked
            for a card does not make the effective batch.
        DoesNotFitError: nothing fits, with the smallest change that would.
    """
    cards = cards or several.cards_asked(config, device)
    config, machine = replace(config, gpus=cards.n), several.shared(device, cards)
    dtype, limits = choose_dtype(config.dtype, device), limits_of(config, machine)
    ranked, best = _chosen(config, model, machine, data, dtype, limits)
    if best is None:
        why = does_not_fit(config, model, machine, data, dtype, limits)
        raise DoesNotFitError(f"{why}\n  {several.NOT_SPLIT}" if max(cards.n, device.n_devices) > 1 else why)
    of_step = step_rows(config, data)
    steps = total_steps(config, data.n_sequences, of_step)
    send = several.sent(config, model, device, cards)
    needs = saving.saving_needs(config, model, on_card=device.kind == "cuda")
    known = [*notes, *told.notes(config, model, device, data, dtype, steps)]
    plan = Plan(
        model=model,
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
        usable_bytes=limits.device_bytes,
        budget=best.budget,
        output_dir=output_dir,
        disk_bytes=needs.adapter_bytes,
        n_cards=cards.n,
        n_nodes=cards.n_nodes,
        step_rows=of_step,
        sent_bytes=send.n_bytes,
        mlp_tile_tokens=best.mix.tile_tokens,
        host_bytes=best.host_bytes,
        saving=needs,
        decisions=explain.decisions(config, model, machine, data, dtype, ranked, best, limits),
        notes=(*known, *saving.notes(needs, device, model, saving.rooms_of(device, output_dir))),
        unknowns=told.unknowns(config, model, device, best.mix),
    )
    if cards.n > 1:
        row = several.decision(device, data, cards, of_step, send)
    elif device.kind == "cuda" and device.n_devices > 1:
        row = several.idle(device, plan, _with_all(config, model, device, data, dtype))
    else:
        return plan
    return replace(plan, decisions=(row, *plan.decisions))


def _with_all(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, dtype: str
) -> float | None:
    """Seconds of a step on all cards of the machine; None where that is not known."""
    cards = Cards(per_node=device.n_devices)
    try:
        config = replace(config, gpus=cards.n)
    except ConfigError:  # what was asked for of one card does not make the batch on several
        return None
    machine = several.shared(device, cards)
    _, best = _chosen(config, model, machine, data, dtype, limits_of(config, machine))
    if best is None or best.step_seconds is None:
        return None
    return best.step_seconds + several.sent(config, model, device, cards).seconds
