"""Rotary positions and context length in llama.cpp's words.

The base, a factor and a kind are numbers in the file. Where transformers scales each frequency by a rule of its own
(Llama 3, LongRoPE), llama.cpp divides by factors that are a tensor in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nbqlora.core.errors import ModelError
from nbqlora.hub.gguf.families import GgufFamily, head_dim


@dataclass(frozen=True, kw_only=True)
class Positions:
    """What the file says about positions.

    Args:
        values: by llama.cpp's keys, without the architecture.
        factors: tensors by name, fp32, ``[rotary width / 2]``.
        notes: where llama.cpp and transformers part.
    """

    values: Mapping[str, int | float | str]
    factors: Mapping[str, np.ndarray[Any, Any]]
    notes: tuple[str, ...]


def positions(family: GgufFamily, config: Any) -> Positions:
    """Read a config's positions. Raises :class:`ModelError` for a kind of scaling that llama.cpp would not apply."""
    given = dict(config.rope_parameters)
    sliding = given.get("sliding_attention")
    rope = given.get("full_attention", given)
    kind = str(rope.get("rope_type", "default"))
    if kind not in family.ropes:
        known = ", ".join(sorted(family.ropes))
        raise ModelError(
            f"llama.cpp does not scale the rotary positions of a {config.model_type} by {kind!r} (rope_type); "
            f"it knows {known} for this family"
        )
    if sliding and sliding.get("rope_type", "default") != "default":
        raise ModelError("llama.cpp scales rotary positions in full layers only; this model has it in windows too")
    rotary = int(head_dim(config) * float(rope.get("partial_rotary_factor") or 1.0))
    if rotary != head_dim(config) and not family.rotates_part:
        raise ModelError(f"llama.cpp rotates whole heads of a {config.model_type}; this one has partial_rotary_factor")
    values: dict[str, int | float | str] = {
        "rope.dimension_count": rotary,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if sliding:
        values["rope.freq_base_swa"] = float(sliding["rope_theta"])
    scaling, factors, notes = _scaling(kind, rope, config, rotary)
    context, window, told = _context(family, config)
    return Positions(values={**values, **scaling, **context, **window}, factors=factors, notes=(*notes, *told))


def _scaling(
    kind: str, rope: Mapping[str, Any], config: Any, rotary: int
) -> tuple[dict[str, int | float | str], dict[str, np.ndarray[Any, Any]], tuple[str, ...]]:
    if kind == "default":
        return {}, {}, ()
    if kind == "llama3":
        return {}, {"rope_freqs.weight": _llama3_factors(rope, rotary)}, ()
    if kind == "linear":
        return {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}, {}, ()
    original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
    values: dict[str, int | float | str] = {
        "rope.scaling.type": kind,
        "rope.scaling.original_context_length": original,
    }
    if kind == "yarn":
        return {**values, **_yarn(rope)}, {}, ()
    stretch = float(rope.get("factor") or config.max_position_embeddings / original)
    own = 1.0 if stretch <= 1 else math.sqrt(1 + math.log(stretch) / math.log(original))
    values["rope.scaling.attn_factor"] = float(rope.get("attention_factor") or own)
    factors = {
        f"rope_factors_{length}.weight": np.asarray(rope[f"{length}_factor"], dtype=np.float32)
        for length in ("long", "short")
    }
    note = (
        f"give llama.cpp a context of at most {original} tokens for short texts: above it takes LongRoPE's long "
        "factors from the first token on, transformers only once a text is longer"
    )
    return values, factors, (note,)


def _yarn(rope: Mapping[str, Any]) -> dict[str, int | float | str]:
    """YaRN's numbers; llama.cpp's own attention factor is transformers' default, so the file holds their ratio."""
    if rope.get("mscale") or rope.get("mscale_all_dim") or rope.get("truncate") is False:
        raise ModelError("llama.cpp knows YaRN without mscale, and with truncated bounds; this model has others")
    factor = float(rope["factor"])
    values: dict[str, int | float | str] = {"rope.scaling.factor": factor}
    default = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
    if given := rope.get("attention_factor"):
        values["rope.scaling.attn_factor"] = float(given) / default
    for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0)):
        if (value := float(rope.get(name) or usual)) != usual:
            values[f"rope.scaling.yarn_{name}"] = value
    return values


def _llama3_factors(rope: Mapping[str, Any], rotary: int) -> np.ndarray[Any, Any]:
    """How much slower each frequency turns: 1 for short waves, ``factor`` for long ones, in between a mix."""
    waves = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, rotary, 2, dtype=np.float64) / rotary)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    turns = float(rope["original_max_position_embeddings"]) / waves
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1 - share) / float(rope["factor"]) + share)).astype(np.float32)


def _context(
    family: GgufFamily, config: Any
) -> tuple[dict[str, int | float | str], dict[str, int | float | str], tuple[str, ...]]:
    length = int(config.max_position_embeddings)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not window or (kinds is not None and "sliding_attention" not in kinds):
        return {"context_length": length}, {}, ()
    if family.window == "pattern":
        return {"context_length": length}, {"attention.sliding_window": int(window)}, ()
    note = (
        f"llama.cpp has no sliding window for this family: the file's context is {min(length, int(window))} tokens, "
        "up to which the window changes nothing"
    )
    return {"context_length": min(length, int(window))}, {}, (note,) if int(window) < length else ()
