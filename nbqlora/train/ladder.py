"""What happens when memory runs out: something is given back or lowered, said, and the same rows run again.

First only the cache is given back, with the graphs of captured steps, whose pool nothing else can use: that is enough
after fragmentation, or when another process took memory for a while. Where it was done a few micro-batches ago it would
only put the end off, so then the next rung is taken at once (:mod:`nbqlora.train.rungs`). A rung stays: what did not
fit once is not tried again, and the plan in the report says what ran in the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from nbqlora.core.errors import MemoryExhaustedError
from nbqlora.core.plan import Decision, Plan
from nbqlora.core.specs import BatchLayout, LayerPolicy
from nbqlora.core.units import format_bytes
from nbqlora.engine.fixed_batch import filled
from nbqlora.engine.fused import engine_of
from nbqlora.engine.head import own_logits_loss
from nbqlora.engine.layer import Layer
from nbqlora.engine.loaded import LoadedModel
from nbqlora.memory.host import read_host
from nbqlora.train.oom import EVAL, OPTIMIZER, PROBE, Shortage, give_back
from nbqlora.train.rungs import Footing, Means, lower

# Micro-batches that have to go well before giving memory back is worth another try by itself.
RECENT = 8
GIVEN_BACK = "unused memory was given back"

# What was short, and in words what is done about it.
Tell = Callable[[Shortage, str], None]


class Ladder:
    """Where a run stands between its plan and the least that it can do with.

    Args:
        loaded: its plan and what stands on the model change with each rung.
        means: what can be lowered at all.
        tell: told of each failure before the next attempt.
    """

    def __init__(self, loaded: LoadedModel, means: Means, tell: Tell) -> None:
        plan = _plan(loaded)
        self._loaded, self._means, self._tell = loaded, means, tell
        self._since_given_back = RECENT
        self.footing = Footing(
            policies=plan.layer_policies,
            loss_chunk_tokens=plan.loss_chunk_tokens,
            mlp_tile_tokens=plan.mlp_tile_tokens,
            host_bytes=plan.host_bytes,
        )

    def passed(self) -> None:
        """A micro-batch went well."""
        self._since_given_back += 1

    def climb_down(self, short: Shortage, *, tried: int) -> None:
        """Give memory back, or stand a rung lower, and say so.

        Args:
            tried: failures of the same work before this one.

        Raises:
            MemoryExhaustedError: nothing is left.
        """
        self._loaded.give_up_step()
        give_back(self._loaded.device)
        recently = tried > 0 or self._since_given_back < RECENT
        found = lower(self.footing, short, self._means) if recently else None
        if found is not None:
            self._stand_on(found[0], short, found[1])
        elif tried == 0:
            self.gave_back()
            self._tell(short, GIVEN_BACK)
        else:
            raise self._exhausted(short)

    def gave_back(self) -> None:
        """Memory was given back, here or on a rank with which this one has to climb."""
        self._since_given_back = 0

    def lower(self, short: Shortage) -> bool:
        """Stand a rung lower before memory runs out, and say so; False where nothing is left to lower."""
        found = lower(self.footing, short, self._means)
        if found is None:
            return False
        self._loaded.give_up_step()
        give_back(self._loaded.device)
        self._stand_on(found[0], short, found[1])
        return True

    def _stand_on(self, footing: Footing, short: Shortage, action: str) -> None:
        self.footing = footing
        plan = footing.put_into(_plan(self._loaded))
        decision = Decision(name="lowered", value=action, because=_why(short))
        self._loaded.run_as(replace(plan, decisions=(*plan.decisions, decision)), captures=footing.captures)
        self._tell(short, action)

    def _exhausted(self, short: Shortage) -> MemoryExhaustedError:
        of = "one document" if short.n_documents == 1 else f"{short.n_documents} documents"
        what = f", on {of} of {short.tokens:,} tokens" if short.tokens else ""
        asked = f", {format_bytes(short.asked_bytes)} asked for" if short.asked_bytes else ""
        least = "" if short.phase == OPTIMIZER else f": {self._in_words(short)}"
        message = f"memory ran out ({short.phase}{asked}{what}) with nothing left to lower{least}"
        return MemoryExhaustedError(message, tokens=short.tokens, room_bytes=_room(self._loaded.device))

    def _in_words(self, short: Shortage) -> str:
        now = self.footing
        words = [f"the loss takes {now.loss_chunk_tokens:,} tokens at once"] if self._means.chunked else []
        if short.phase != EVAL:
            counts = {p: now.policies.count(p) for p in LayerPolicy if p in now.policies}
            words.insert(0, "layers " + " + ".join(f"{n} {policy.value}" for policy, n in counts.items()))
            words += [f"MLPs {now.mlp_tile_tokens:,}"] if now.mlp_tile_tokens else []
        return ", ".join(words)


def _why(short: Shortage) -> str:
    asked = format_bytes(short.asked_bytes or 0)
    if short.phase == PROBE:
        return f"the probe took {asked} more than there may be"
    return f"memory ran out ({short.phase}{f', {asked} more were asked for' if short.asked_bytes else ''})"


def means_of(loaded: LoadedModel, ram_bytes: int) -> Means:
    """What can be lowered for this model.

    Args:
        ram_bytes: host memory that inputs of layers may take; 0 for none.
    """
    plan, engine = _plan(loaded), engine_of(loaded.model)
    fused = engine is not None and engine.complete
    itemsize = loaded.dtype.itemsize if fused else torch.float32.itemsize
    rows = plan.micro_batch_size if plan.data.layout is BatchLayout.PADDED else 1
    return Means(
        model=plan.model,
        itemsize=itemsize,
        fused=fused,
        chunked=loaded.loss is not own_logits_loss,
        tiles=fused and engine is not None and not any(_drops(layer) for layer in engine.layers.values()),
        slot_bytes=rows * filled(plan.most_tokens, plan.most_tokens) * plan.model.d_model * itemsize,
        ram_bytes=ram_bytes,
        on_card=loaded.device.type == "cuda",
    )


def _drops(layer: Layer) -> bool:
    """Whether the MLP's adapters have a dropout, whose mask a tile would draw anew."""
    loras = [p.lora for group in (layer.gate_up, layer.down) for p in group.projections if p.lora]
    return any(getattr(lora.dropout, "p", 0.0) > 0 for lora in loras)


def _plan(loaded: LoadedModel) -> Plan:
    assert loaded.plan is not None
    return loaded.plan


def _room(device: torch.device) -> int:
    """What this process could have in all, as ``max_memory_allocated`` counts it (its RAM on a CPU)."""
    if device.type != "cuda":
        host = read_host()
        return host.process_bytes + host.free_bytes
    card = torch.cuda.current_device() if device.index is None else device.index
    free, total = torch.cuda.mem_get_info(card)
    limit = int(torch.cuda.get_per_process_memory_fraction(card) * total)
    return min(limit, torch.cuda.memory_allocated(card) + free)
