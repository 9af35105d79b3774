"""How decoder families differ, as data: which norms stand where, how they round, where a window is named.

The fused layer is one piece of code; a family is a row here. A row is not trusted: when a model is loaded, each kind
of layer is compared with transformers' own on a few tokens, and left as it was where the two differ. Every row has a
test against transformers and PEFT, loss and gradients, packed and unpacked.

Source: transformers 5.15 to 5.23, ``modeling_<family>.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

NormStyle = Literal["llama", "gemma", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder layer, relative to Llama's.

    Args:
        norm: how a norm rounds: ``llama`` weighs in the dtype, ``gemma`` weighs by ``1 + weight`` in fp32, ``fp32``
            weighs in fp32.
        attention_in, attention_out, mlp_in, mlp_out: the layer's attribute that norms there; "" for no norm.
        qk_norm: q and k are normed each ``head``, or over all heads (``full``); "" for not at all.
        window: where a sliding window is named: on the attention ``module``, in the ``config``, or nowhere ("").
        caps_scores: its attention caps scores, as the checkpoints that there are have it.
        scales_residual: what is added to the residual is multiplied by a number.
        joined_linears: q, k and v are one linear, gate and up another.
    """

    norm: NormStyle = "llama"
    attention_in: str = "input_layernorm"
    attention_out: str = ""
    mlp_in: str = "post_attention_layernorm"
    mlp_out: str = ""
    qk_norm: Literal["", "head", "full"] = ""
    window: Literal["", "module", "config"] = ""
    caps_scores: bool = False
    scales_residual: bool = False
    joined_linears: bool = False


# Norms on both sides of each half, and norms behind the halves only.
_SANDWICH = Family(
    attention_out="post_attention_layernorm", mlp_in="pre_feedforward_layernorm", mlp_out="post_feedforward_layernorm"
)
_BEHIND = Family(
    attention_in="", attention_out="post_attention_layernorm", mlp_in="", mlp_out="post_feedforward_layernorm"
)

FAMILIES: Mapping[str, Family] = {
    "llama": Family(),
    "mistral": Family(window="config"),
    "ministral": Family(window="module"),
    "qwen2": Family(window="module"),
    "qwen3": Family(qk_norm="head", window="module"),
    "gemma": Family(norm="gemma"),
    "gemma2": replace(_SANDWICH, norm="gemma", window="module", caps_scores=True),
    "gemma3_text": replace(_SANDWICH, norm="gemma", qk_norm="head", window="module"),
    "phi3": Family(window="config", joined_linears=True),
    "granite": Family(scales_residual=True),
    "olmo2": replace(_BEHIND, norm="fp32", qk_norm="full"),
    "olmo3": replace(_BEHIND, norm="fp32", qk_norm="full", window="module"),
    "seed_oss": Family(),
    "smollm3": Family(window="module"),
}
