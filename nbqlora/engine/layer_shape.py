"""A decoder layer's widths, read from a model's config without the library that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbqlora.core.families import FAMILIES, Family
from nbqlora.engine.match import ACTIVATIONS


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """A decoder layer's widths, as a config names them.

    Args:
        architecture: a row of ``FAMILIES``.
        activation: as transformers names it.
        softcap: of attention's scores, None for none.
    """

    architecture: str
    d_model: int
    d_ff: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    vocab_size: int
    activation: str
    softcap: float | None = None

    @property
    def family(self) -> Family:
        """What makes it differ from Llama's."""
        return FAMILIES[self.architecture]

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(n_out, n_in)`` by name, q to down."""
        d, f, q, kv = self.d_model, self.d_ff, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        if self.family.joined_linears:
            return {"qkv_proj": (q + 2 * kv, d), "o_proj": (d, q), "gate_up_proj": (2 * f, d), "down_proj": (d, f)}
        attention = {"q_proj": (q, d), "k_proj": (kv, d), "v_proj": (kv, d), "o_proj": (d, q)}
        return {**attention, "gate_proj": (f, d), "up_proj": (f, d), "down_proj": (d, f)}


def shape_of(config: Mapping[str, Any]) -> LayerShape | None:
    """A layer of the model that a ``config.json`` describes; None of one that no fused layer stands for, or that is
    described otherwise.
    """
    text = config.get("text_config") or config
    architecture = text.get("model_type", "")
    activation = text.get("hidden_activation") or text.get("hidden_act")
    try:
        d_model, n_heads = int(text["hidden_size"]), int(text["num_attention_heads"])
        d_ff, vocab_size = int(text["intermediate_size"]), int(text["vocab_size"])
    except (KeyError, TypeError, ValueError):
        return None
    if architecture not in FAMILIES or activation not in ACTIVATIONS:
        return None
    return LayerShape(
        architecture=architecture,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=int(text.get("num_key_value_heads") or n_heads),
        head_dim=int(text.get("head_dim") or d_model // n_heads),
        vocab_size=vocab_size,
        activation=activation,
        softcap=text.get("attn_logit_softcapping") if FAMILIES[architecture].caps_scores else None,
    )
