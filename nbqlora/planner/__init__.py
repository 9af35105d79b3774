"""Config, model, machine and data -> a plan: which batch, what each layer keeps, and why.

Memory is counted tensor by tensor: a fused layer's in ``fused`` and ``walk``, a run on them in ``fused_memory``; one on
transformers' own layers in ``layer`` and ``stock``. Among the splits of ``effective_batch_size`` and the numbers of
layers that keep all, all but their MLP's, or their input alone, the fastest that fits wins. Pure arithmetic: any
machine can be planned for on any machine.
"""

from __future__ import annotations

import math

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import DoesNotFitError
from nbqlora.core.plan import Plan
from nbqlora.core.specs import DataStats, DeviceSpec, ModelSpec
from nbqlora.core.units import GIB
from nbqlora.planner import explain, saving
from nbqlora.planner.advice import does_not_fit
from nbqlora.planner.search import candidates
from nbqlora.planner.standing import FRAGMENTATION_BYTES, choose_dtype, quantized

Notes = tuple[str, ...]


def usable_bytes(config: FinetuneConfig, device: DeviceSpec) -> int:
    """What the run may allocate: ``vram_gib`` of what is free, or all that is free less a reserve.

    On a CPU the process itself counts, so what it already holds is added to what is free.
    """
    there = device.free_bytes + (device.context_bytes if device.kind == "cpu" else 0)
    if config.vram_gib is not None:
        return min(int(config.vram_gib * GIB), there)
    return max(0, there - FRAGMENTATION_BYTES)


def total_steps(config: FinetuneConfig, n_sequences: int, rows: int, accumulation: int) -> int:
    """Optimizer steps, as Trainer counts them: an epoch's last step may hold fewer rows."""
    if config.max_steps > 0:
        return config.max_steps
    return math.ceil(config.num_train_epochs * math.ceil(math.ceil(n_sequences / rows) / accumulation))


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
    dtype, limit = choose_dtype(config.dtype, device), usable_bytes(config, device)
    ranked = candidates(config, model, device, data, dtype, limit)
    best = next((x for x in ranked if x.budget.total_bytes <= limit), None)
    if best is None:
        raise DoesNotFitError(does_not_fit(config, model, device, data, dtype, limit))
    steps = total_steps(config, data.n_sequences, best.micro_batch_size, best.accumulation)
    needs = saving.saving_needs(config, model, on_card=device.kind == "cuda")
    told = [*notes, *explain.notes(config, model, device, data, dtype, steps)]
    return Plan(
        model=model,
        device=device,
        data=data,
        dtype=dtype,
        load_in_4bit=quantized(model, config),
        micro_batch_size=best.micro_batch_size,
        gradient_accumulation_steps=best.accumulation,
        max_length=config.max_length,
        layer_policies=best.policies,
        loss_chunk_tokens=best.loss_chunk_tokens,
        total_steps=steps,
        step_seconds=best.step_seconds,
        usable_bytes=limit,
        budget=best.budget,
        output_dir=output_dir,
        disk_bytes=needs.adapter_bytes,
        saving=needs,
        decisions=explain.decisions(config, model, device, data, dtype, ranked, best, limit),
        notes=(*told, *saving.notes(needs, device, model, saving.rooms_of(device, output_dir))),
        unknowns=explain.unknowns(config, model, device),
    )
