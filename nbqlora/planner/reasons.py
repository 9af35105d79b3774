"""Why a batch, its layers, their tiles and the loss's chunk are what they are: what the next quicker way would take."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.core.units import format_bytes
from nbqlora.planner.candidate import Candidate
from nbqlora.planner.limits import Limits
from nbqlora.planner.logits import LOSS_CHUNK_BYTES, MAX_CHUNK
from nbqlora.planner.mix import Mix, all_kept


def rows(count: int, data: DataStats) -> str:
    """``2 packs at once``."""
    word = "pack" if data.layout is BatchLayout.PACKED else "row"
    return f"{count} {word}{'s' if count != 1 else ''} at once"


def in_words(mix: Mix) -> str:
    """``24 keep · 8 recompute MLP``."""
    counts = (
        (mix.keep, "keep"),
        (mix.recompute_mlp, "recompute MLP"),
        (mix.recompute, "recompute"),
        (mix.offload, "offload"),
        (mix.join, "join"),
    )
    return " · ".join(f"{n} {what}" for n, what in counts if n)


def batch(config: FinetuneConfig, data: DataStats, ranked: Sequence[Candidate], best: Candidate, limits: Limits) -> str:
    """What the next larger batch would cost."""
    if config.per_device_train_batch_size or config.gradient_accumulation_steps:
        return "pinned"
    larger = [x for x in ranked if x.micro_batch_size > best.micro_batch_size]
    if not larger:
        return f"all {best.micro_batch_size} of a step at once, the fewest passes"
    nearest = min(larger, key=lambda x: (x.micro_batch_size, x.budget.total_bytes))
    words = rows(nearest.micro_batch_size, data)
    fitting = [x for x in larger if x.micro_batch_size == nearest.micro_batch_size and limits.fit(x)]
    if not fitting:
        least = " at the least" if config.gradient_checkpointing == "auto" else ""
        return f"{words} would need {format_bytes(nearest.budget.total_bytes)}{least}"
    return f"{words} would {_slower(min(fitting, key=lambda x: (x.step_seconds or 0.0, x.twice)), best)}"


def _slower(other: Candidate, best: Candidate) -> str:
    extra = best.mix.keep - other.mix.keep
    words = [f"compute {extra} more layers twice"] if extra > 0 else []
    if other.step_seconds and best.step_seconds:
        percent = (other.step_seconds / best.step_seconds - 1) * 100
        words += [f"{'' if words else 'be '}{percent:.0f} % slower"] if percent >= 0.5 else []
    return ": ".join(words) or "not be faster"


def layers(config: FinetuneConfig, best: Candidate, limits: Limits) -> str:
    """What they cost against keeping everything, and what the next quicker ones would be over."""
    mix = best.mix
    if config.gradient_checkpointing != "auto":
        return "pinned by gradient_checkpointing"
    if mix.keep == mix.n_layers:
        return "everything fits, so nothing is computed twice"
    kept = all_kept(mix.n_layers)
    saved = best.memory.total_bytes(kept) - best.budget.total_bytes
    words = f"{_longer(best, kept)} for -{format_bytes(saved)}"
    quicker = [(best.memory.total_bytes(other) - limits.device_bytes, what) for what, other in _quicker(mix)]
    short, what = min(((over, what) for over, what in quicker if over > 0), default=(0, ""))
    return f"{words}; {what} would be {format_bytes(short)} over" if what else words


def tiles(best: Candidate, limits: Limits) -> str:
    """What MLPs of twice as many tokens, and whole ones, would cost."""
    whole = best.mix.with_tiles(0)
    slower = _longer(best, whole)
    over = best.memory.total_bytes(whole) - limits.device_bytes
    what = f"{format_bytes(over)} over" if over > 0 else f"{format_bytes(-over)} below what may be used"
    return f"{slower}; whole MLPs would be {what}"


def chunk(best: Candidate) -> str:
    """What ends the number of supervised tokens whose logits exist together."""
    tokens, each = best.loss_chunk_tokens, best.memory.logits
    size = f"logits of {format_bytes(tokens * each)}"
    if tokens >= best.memory.most_rows:
        return f"{size}: all that are learned"
    if tokens == MAX_CHUNK or 2 * tokens * each > LOSS_CHUNK_BYTES:
        return f"{size}: more would not be faster"
    return f"{size}: twice as many would raise the peak"


def _longer(best: Candidate, other: Mix) -> str:
    """How much more time the best takes than with other layers."""
    more = (best.pace.seconds(best.mix) / best.pace.seconds(other) - 1) * 100
    return f"+{more:.0f} % step time" if more >= 0.95 else f"+{more:.1f} % step time"


def _quicker(mix: Mix) -> Iterator[tuple[str, Mix]]:
    """Mixes that are one step quicker, in words."""
    more = "one more layer kept"
    if mix.recompute_mlp:
        yield more, replace(mix, keep=mix.keep + 1, recompute_mlp=mix.recompute_mlp - 1)
    if mix.join:
        yield "one layer fewer that joins", replace(mix, recompute=mix.recompute + 1, join=mix.join - 1)
        return
    for name in ("recompute", "offload"):
        n = getattr(mix, name)
        if n:
            yield more, replace(mix, keep=mix.keep + 1, **{name: n - 1})
            words = "one more layer that recomputes its MLP alone"
            yield words, replace(mix, recompute_mlp=mix.recompute_mlp + 1, **{name: n - 1})
