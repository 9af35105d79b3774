"""Whole on each card, or split over all of them: what is tried, why something is not, and how a plan says it.

Whole is tried first, since nothing has to be gathered then. ``shards`` has the bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.families import FAMILIES
from nbqlora.core.plan import Decision
from nbqlora.core.specs import DeviceSpec, ModelSpec
from nbqlora.core.units import format_bytes
from nbqlora.planner import shards
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.fused import fused_family
from nbqlora.planner.standing import DTYPE_BYTES, quantized, weight_bytes

WHOLE = "leave fsdp out: each card then has the whole model"


def ways(config: FinetuneConfig, model: ModelSpec) -> tuple[FinetuneConfig, ...]:
    """The config with ``fsdp`` decided, the way that is tried first before the others.

    Args:
        config: with ``gpus`` as a number.

    Raises:
        ConfigError: ``fsdp = true``, and the weights cannot be split.
    """
    problem = not_split_because(config, model)
    if config.fsdp is True and problem:
        raise ConfigError([problem])
    whole, split = replace(config, fsdp=False), replace(config, fsdp=True)
    if config.fsdp is True:
        return (split,)
    return (whole,) if config.fsdp is False or problem else (whole, split)


def not_split_because(config: FinetuneConfig, model: ModelSpec) -> Problem | None:
    """What keeps the weights from being split over the cards; None for nothing."""
    if shards.n_cards(config) == 1:
        hint = 'write gpus = 2, or "all"; or leave fsdp out'
        return Problem(key="fsdp", message="one card trains, so there is none to share the weights with", hint=hint)
    if not quantized(model, config):
        message = "only NF4 weights are split, and load_in_4bit = false keeps them in full size"
        return Problem(key="fsdp", message=message, hint="write load_in_4bit = true")
    if fused_family(model, config) is None:
        message = "only fused layers are split, and " + (
            "these settings of [peft] leave them transformers' own"
            if model.architecture in FAMILIES
            else f"those of a {model.architecture} model stay transformers' own"
        )
        return Problem(key="fsdp", message=message, hint=WHOLE)
    asked = config.gradient_checkpointing
    if isinstance(asked, Mapping) and asked.get("join"):
        message = "a layer that joins would need the weights of those before it too, so none joins where they are split"
        return Problem(
            key="gradient_checkpointing", message=message, hint="write recompute or offload in place of join"
        )
    return None


def decision(config: FinetuneConfig, model: ModelSpec, best: Candidate, whole_bytes: int, *, pinned: bool) -> Decision:
    """What is split, what is gathered, and whether the link or the layers' own work decides how long that takes.

    Args:
        whole_bytes: the least that a card would need with the whole model.
        pinned: ``fsdp`` was asked for.
    """
    n = shards.shards_of(config)
    whole, each = (format_bytes(model.n_layers * size) for size in _sizes(model, n))
    because = "pinned by fsdp" if pinned else f"whole on each card, {format_bytes(whole_bytes)} would be needed"
    gathered = format_bytes(shards.gathered_bytes(model, n))
    sent = format_bytes(shards.step_bytes(model, n, best.accumulation))
    return Decision(
        name="weights",
        value=f"split over {n} cards (FSDP)",
        because=f"{because}; {each} of the layers' {whole} on each and {gathered} for two gathered ones; "
        f"{sent} sent a step; {_what_decides(best)}",
    )


def _sizes(model: ModelSpec, n: int) -> tuple[int, int]:
    return shards.layer_bytes(model), shards.share_bytes(model, n)


def _what_decides(best: Candidate) -> str:
    pace, n = best.pace, best.accumulation
    took = f"a layer's weights take {_ms(pace.gather / n)}"
    if not pace.measured:
        return f"{took}, and how long it computes is not known"
    beside = [seconds / n for _, seconds in pace.beside(best.mix)]
    computes = f"{_ms(beside[0])} forward and {_ms(min(beside[1:]))} backward"
    more = pace.gathering(best.mix) / (pace.seconds(best.mix) - pace.gathering(best.mix)) * 100
    slowest = "the link decides" if pace.gather / n > min(beside) else "computing decides"
    return f"{took}, computing {computes}: {slowest}, +{more:.1f} % step time"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"


def notes(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec) -> list[str]:
    """What loading needs of the host: NF4 that is made on loading lies there once, as one rank after another makes it.

    Args:
        device: whose host is asked, with all that is free.
    """
    needed = weight_bytes(model, replace(config, fsdp=False), DTYPE_BYTES["bf16"])
    if model.quantized or shards.shards_of(config) == 1 or needed <= device.host_free_bytes:
        return []
    free = format_bytes(device.host_free_bytes)
    how = "a checkpoint that is stored in NF4 is read from its files and needs none of it"
    return [f"RAM: making NF4 of this checkpoint takes {format_bytes(needed)} there, and {free} are free; {how}"]
