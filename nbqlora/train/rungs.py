"""The rungs below a plan: what to lower when memory ran out, and by how much. Pure arithmetic.

In this order, because the first cost nothing or little time and change no bit of the result: no capture where it was
the capture that had no room; fewer tokens in the loss at once; layers that compute their MLP again, then layers that
keep their input alone, first layers first, since what keeps the most stands last (the backward frees it before it
comes to the first layers); inputs in host memory. Then the micro-batch is cut between documents or rows: the same
sums in another order. What cannot be cut, one long document, has its MLPs computed in tiles.

How many layers a rung takes is decided by what the failed allocation asked for, and an eighth of the layers at least:
more may be missing than one allocation, and each failure costs a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nbqlora.core.plan import Plan
from nbqlora.core.specs import LayerPolicy, ModelSpec
from nbqlora.train.oom import EVAL, OPTIMIZER, Shortage

KEEP, MLP, ALL = LayerPolicy.KEEP, LayerPolicy.RECOMPUTE_MLP, LayerPolicy.RECOMPUTE
# Tokens that no chunk and no tile goes below: matmuls over fewer take no less time.
LEAST_TOKENS = 64
# A chunk or a tile becomes so much smaller at once.
FACTOR = 4
# Layers that a rung takes at least, as a share of all.
SHARE = 8


@dataclass(frozen=True, kw_only=True)
class Footing:
    """How micro-batches run now.

    Args:
        captures: steps may be captured.
        part_tokens: a micro-batch of more tokens runs in parts; 0 for all at once. ``eval_part_tokens``: the same for
            evaluation.
        host_bytes: pinned host memory for the inputs of layers that offload.
        offloads: more layers may; False once the host did not have the room.
    """

    policies: tuple[LayerPolicy, ...]
    loss_chunk_tokens: int
    mlp_tile_tokens: int = 0
    host_bytes: int = 0
    captures: bool = True
    part_tokens: int = 0
    eval_part_tokens: int = 0
    offloads: bool = True

    def put_into(self, plan: Plan) -> Plan:
        """The plan with these numbers."""
        return replace(
            plan,
            layer_policies=self.policies,
            loss_chunk_tokens=self.loss_chunk_tokens,
            mlp_tile_tokens=self.mlp_tile_tokens,
            host_bytes=self.host_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class Means:
    """What this model on this machine can do.

    Args:
        itemsize: bytes of an element of an activation.
        fused: every layer is a fused one.
        chunked: the loss takes its tokens in chunks.
        tiles: MLPs can be computed in tiles.
        slot_bytes: the largest input of a layer, in host memory.
        ram_bytes: host memory that inputs of layers may take in all; 0: none.
        on_card: activations are not in the host's memory.
    """

    model: ModelSpec
    itemsize: int
    fused: bool
    chunked: bool
    tiles: bool
    slot_bytes: int
    ram_bytes: int
    on_card: bool = True


# A lower footing, and in words what is different on it; None where the rung has nothing to give.
Lowered = tuple[Footing, str] | None


def lower(now: Footing, short: Shortage, means: Means) -> Lowered:
    """The first rung that has something to give; None when nothing is left."""
    if short.phase == OPTIMIZER:  # nothing of a micro-batch is there any more
        return None
    if short.on_host and means.on_card:
        return _not_offloaded(now) if LayerPolicy.OFFLOAD in now.policies else None
    rungs: tuple[Callable[[Footing, Shortage, Means], Lowered], ...]
    rungs = (_chunk, _eval_parts) if short.phase == EVAL else (_eager, _chunk, _recompute, _offload, _parts, _tiles)
    return next((found for rung in rungs if (found := rung(now, short, means))), None)


def _eager(now: Footing, short: Shortage, means: Means) -> Lowered:
    if not (short.capturing and now.captures):
        return None
    return replace(now, captures=False), "steps are launched kernel by kernel: there was no room to capture one"


def _chunk(now: Footing, short: Shortage, means: Means) -> Lowered:
    used = min(now.loss_chunk_tokens, short.tokens or now.loss_chunk_tokens)
    if not means.chunked or used <= LEAST_TOKENS:
        return None
    tokens = max(LEAST_TOKENS, used // FACTOR)
    return replace(now, loss_chunk_tokens=tokens), f"the loss takes {tokens:,} tokens at once"


def _recompute(now: Footing, short: Shortage, means: Means) -> Lowered:
    m, row = means.model, short.tokens * means.itemsize
    mlp = 2 * m.d_ff * row
    rest = (2 * m.d_model + 2 * (m.n_heads + m.n_kv_heads) * m.head_dim) * row
    if means.fused and KEEP in now.policies:
        policies, n = _moved(now.policies, KEEP, MLP, _layers(now, short, mlp))
        return replace(now, policies=policies), f"{n} more layers compute their MLP again in the backward"
    for old, saved in ((KEEP, mlp + rest), (MLP, rest)):
        if old in now.policies:
            policies, n = _moved(now.policies, old, ALL, _layers(now, short, saved))
            return replace(now, policies=policies), f"{n} more layers keep their input alone"
    return None


def _offload(now: Footing, short: Shortage, means: Means) -> Lowered:
    there = now.policies.count(LayerPolicy.OFFLOAD)
    slot = now.host_bytes // there if there else means.slot_bytes
    room = means.ram_bytes // slot - there if slot and now.offloads else 0
    if room <= 0 or ALL not in now.policies:
        return None
    wanted = _layers(now, short, slot)
    policies, n = _moved(now.policies, ALL, LayerPolicy.OFFLOAD, min(wanted, room))
    lowered = replace(now, policies=policies, host_bytes=(there + n) * slot)
    return lowered, f"the inputs of {n} more layers lie in host memory"


def _not_offloaded(now: Footing) -> Lowered:
    back = tuple(ALL if p is LayerPolicy.OFFLOAD else p for p in now.policies)
    return replace(
        now, policies=back, host_bytes=0, offloads=False
    ), "no inputs lie in host memory: it did not have the room"


def _parts(now: Footing, short: Shortage, means: Means) -> Lowered:
    tokens = _half(now.part_tokens, short)
    if not tokens:
        return None
    return replace(now, part_tokens=tokens), f"micro-batches of more than {tokens:,} tokens run in parts"


def _eval_parts(now: Footing, short: Shortage, means: Means) -> Lowered:
    tokens = _half(now.eval_part_tokens, short)
    if not tokens:
        return None
    return replace(now, eval_part_tokens=tokens), f"evaluation takes no more than {tokens:,} tokens at once"


def _half(limit: int, short: Shortage) -> int:
    """Half of what did not fit, below the limit so far; 0 where that is one document."""
    if short.n_documents < 2:
        return 0
    half = -(-short.tokens // 2)
    return max(1, min(half, limit // 2)) if limit else half


def _tiles(now: Footing, short: Shortage, means: Means) -> Lowered:
    used = min(now.mlp_tile_tokens or short.tokens, short.tokens)
    if not means.tiles or used <= LEAST_TOKENS:
        return None
    tokens = max(LEAST_TOKENS, used // FACTOR)
    return replace(now, mlp_tile_tokens=tokens), f"MLPs take {tokens:,} tokens at once"


def _layers(now: Footing, short: Shortage, saved_bytes: int) -> int:
    """Layers to change, where each gives so much back."""
    missing = -(-(short.asked_bytes or 0) // max(1, saved_bytes))
    return max(missing, -(-len(now.policies) // SHARE))


def _moved(
    policies: tuple[LayerPolicy, ...], old: LayerPolicy, new: LayerPolicy, n: int
) -> tuple[tuple[LayerPolicy, ...], int]:
    """The first ``n`` layers of one policy with another; and how many there were."""
    chosen = [i for i, policy in enumerate(policies) if policy is old][:n]
    return tuple(new if i in chosen else policy for i, policy in enumerate(policies)), len(chosen)
