"""The end of a run that found no memory: what was kept, and what would fit in the room that there really was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import MemoryExhaustedError
from nbqlora.core.events import Event, SavedEvent
from nbqlora.core.plan import Plan
from nbqlora.core.units import format_bytes
from nbqlora.planner.advice import LENGTH_STEP, longest_that_fits


def with_what_fits(
    error: MemoryExhaustedError, config: FinetuneConfig, plan: Plan, events: Iterable[Event], hint: str, *, writes: bool
) -> MemoryExhaustedError:
    """The same error, with what to do about it.

    Args:
        hint: a line on how to resume; "" for none.
        writes: this process saves; another one knows what was saved where it does not.
    """
    room = plan.usable_bytes if error.room_bytes is None else min(plan.usable_bytes, error.room_bytes)
    saved = [e for e in events if isinstance(e, SavedEvent)]
    kept = f"the adapter of step {saved[-1].step} is in {saved[-1].path}" if saved else "no step was taken before it"
    if not error.adapter_is_whole:
        kept = f"what was saved last is {saved[-1].path}" if saved else "nothing was saved"
    if not writes:
        kept = "rank 0 says what was kept"
    lines = [
        f"{plan.device.name}: {error}",
        f"  {_what_fits(error, config, plan, room)}",
        f"  all memory of this run was given back; {kept}{hint}",
    ]
    return MemoryExhaustedError("\n".join(lines), tokens=error.tokens, room_bytes=error.room_bytes)


def _what_fits(error: MemoryExhaustedError, config: FinetuneConfig, plan: Plan, room: int) -> str:
    had = f"in the {format_bytes(room)} that this run could have"
    if not error.tokens:  # the optimizer's step; no row is too long for it
        return f"{_smaller_optimizer(config)} {had}"
    as_planned = replace(config, gpus=plan.n_cards, fsdp=plan.shards > 1)
    model = replace(plan.model, embedding_on_host=plan.offload_embedding)
    found, _ = longest_that_fits(as_planned, model, plan.device, plan.data, plan.dtype, room)
    if error.tokens:  # the plan is wrong about these, so it is not asked about as many
        found = min(found, (error.tokens - 1) // LENGTH_STEP * LENGTH_STEP)
    if found:
        return f"max_length = {found} fits {had}"
    return f"no max_length fits {had}: a smaller model does, or a card that other processes leave alone"


def _smaller_optimizer(config: FinetuneConfig) -> str:
    if config.optim != "adamw_8bit":
        return 'optim = "adamw_8bit" needs a quarter of the optimizer\'s states'
    if config.lora_r > 1:
        return f"lora_r = {config.lora_r // 2} needs at most half of the optimizer's states"
    return "the optimizer's states found no room"
