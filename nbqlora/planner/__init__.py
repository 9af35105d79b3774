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
from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.planner import explain, saving, told
from nbqlora.planner.advice import does_not_fit
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.limits import Limits, limits_of
from nbqlora.planner.search import candidates
from nbqlora.planner.standing import choose_dtype, quantized

Notes = tuple[str, ...]


def total_steps(config: FinetuneConfig, n_sequences: int, rows: int, accumulation: int) -> int:
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
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, data: DataStats, *, output_dir: str, notes: Notes = ()
) -> Plan:
    """Decide everything; nothing is loaded or allocated.

    Args:
        notes: what the caller knows and the plan should say.

    Raises:
        ConfigError: ``gradient_checkpointing`` names another number of layers than the model has.
        DoesNotFitError: nothing fits, with the smallest change that would.
    """
    dtype, limits = choose_dtype(config.dtype, device), limits_of(config, device)
    ranked, best = _chosen(config, model, device, data, dtype, limits)
    if best is None:
        raise DoesNotFitError(does_not_fit(config, model, device, data, dtype, limits))
    steps = total_steps(config, data.n_sequences, best.micro_batch_size, best.accumulation)
    needs = saving.saving_needs(config, model, on_card=device.kind == "cuda")
    known = [*notes, *told.notes(config, model, device, data, dtype, steps)]
    return Plan(
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
        step_seconds=best.step_seconds,
        usable_bytes=limits.device_bytes,
        budget=best.budget,
        output_dir=output_dir,
        disk_bytes=needs.adapter_bytes,
        mlp_tile_tokens=best.mix.tile_tokens,
        host_bytes=best.host_bytes,
        saving=needs,
        decisions=explain.decisions(config, model, device, data, dtype, ranked, best, limits),
        notes=(*known, *saving.notes(needs, device, model, saving.rooms_of(device, output_dir))),
        unknowns=told.unknowns(config, model, device, best.mix),
    )
