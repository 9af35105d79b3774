"""How llama.cpp knows the families that transformers knows, as data.

A row says what llama.cpp calls a family, what of it llama.cpp takes from the file, what it computes in its own way,
and what it cannot do at all. Before anything is written, a config is held against its row: a setting that llama.cpp
would pass over in silence is an error here. Every row has a test in which llama.cpp loads a file and gives
transformers' tokens.

Source: how llama.cpp b9190 and newer releases load and compute each architecture; the rest was found by running them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from nbqlora.core.errors import ModelError

_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_ALL_BIASES = _QKV | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"}
_PLAIN_ROPE = frozenset({"default", "linear", "yarn"})


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """A family, relative to what most have.

    Args:
        arch: llama.cpp's name.
        activations: of the MLP; llama.cpp computes the first and takes the others for it.
        weaves: llama.cpp rotates neighbouring rows of q and k, transformers the two halves of a head: rows are woven.
        adds_one: its norms weigh by ``1 + weight``, and llama.cpp wants the sum.
        biases: the linears whose bias llama.cpp reads.
        ropes: the kinds of rotary scaling that llama.cpp applies.
        window: how llama.cpp treats a sliding window: it has it in the layers that are not ``full_period``-th
            (``pattern``); or it has none, so that the context ends where the window would begin to matter (``capped``).
        full_period: every such layer sees all tokens, the others a window.
        bare_period: every such layer has no rotary position.
        head: ``tied`` when llama.cpp always takes the embedding as the head, ``stored`` when it never does.
        scalars: settings that are numbers in the file, by llama.cpp's key.
        fixed: settings that llama.cpp has no key for, with the values it computes.
        rotates_part: it can leave a part of each head without a position.
        heads_fill: heads times ``head_dim`` must be d_model.
        mean_head_layers: with so many layers, scores are divided by the root of d_model / heads and not of head_dim.
        norm_key: what the epsilon of the norms is called.
    """

    arch: str
    activations: tuple[str, ...] = ("silu",)
    weaves: bool = False
    adds_one: bool = False
    biases: frozenset[str] = frozenset()
    ropes: frozenset[str] = _PLAIN_ROPE
    window: Literal["capped", "pattern"] = "capped"
    full_period: int = 0
    bare_period: int = 0
    head: Literal["", "tied", "stored"] = ""
    scalars: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    rotates_part: bool = False
    heads_fill: bool = False
    mean_head_layers: int = 0
    norm_key: str = "attention.layer_norm_rms_epsilon"


_LLAMA = GgufFamily(arch="llama", weaves=True, biases=_ALL_BIASES, ropes=_PLAIN_ROPE | {"llama3", "longrope"})
_GEMMA = GgufFamily(
    arch="gemma",
    activations=("gelu_pytorch_tanh", "gelu"),
    adds_one=True,
    head="tied",
    fixed={"use_bidirectional_attention": (None, False)},
)
_GEMMA_3_FIXED = {**_GEMMA.fixed, "final_logit_softcapping": (None,), "attn_logit_softcapping": (None,)}

FAMILIES: Mapping[str, GgufFamily] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "qwen2": GgufFamily(arch="qwen2", biases=_QKV),
    "qwen3": GgufFamily(arch="qwen3"),
    "gemma": _GEMMA,
    "gemma2": replace(
        _GEMMA,
        arch="gemma2",
        ropes=frozenset({"default"}),
        window="pattern",
        full_period=2,
        scalars={
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        mean_head_layers=46,
    ),
    "gemma3_text": replace(
        _GEMMA, arch="gemma3", window="pattern", full_period=6, fixed=_GEMMA_3_FIXED, mean_head_layers=62
    ),
    "phi3": GgufFamily(arch="phi3", ropes=frozenset({"default", "longrope"}), rotates_part=True, heads_fill=True),
    "granite": replace(
        _LLAMA,
        arch="granite",
        scalars={
            "logits_scaling": "logit_scale",
            "residual_multiplier": "residual_scale",
            "embedding_multiplier": "embedding_scale",
            "attention_multiplier": "attention.scale",
        },
    ),
    "olmo2": GgufFamily(arch="olmo2", head="stored", heads_fill=True),
    "olmo3": GgufFamily(arch="olmo2", head="stored", heads_fill=True, window="pattern", full_period=4),
    "smollm3": GgufFamily(arch="smollm3", weaves=True, bare_period=4),
    "seed_oss": GgufFamily(arch="seed_oss", biases=_QKV),
    "cohere": GgufFamily(
        arch="command-r",
        head="tied",
        ropes=frozenset({"default"}),
        scalars={"logit_scale": "logit_scale"},
        fixed={"use_qk_norm": (False,)},
        norm_key="attention.layer_norm_epsilon",
    ),
}


def family_of(config: Mapping[str, Any]) -> tuple[GgufFamily, Any]:
    """The row for a ``config.json``, and the config as transformers completes it.

    Raises:
        ModelError: there is no row for this family, or transformers cannot read the config.
    """
    kind = str(config.get("model_type", "none"))
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(
            f"a model of the kind {kind} cannot be exported to GGUF; it can be for {known}\n"
            "  merge it instead: llama.cpp's own converter may know the merged folder"
        )
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        whole = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if k != "model_type"})
    except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"cannot read the model's config.json: {str(error).splitlines()[0]}") from error
    return FAMILIES[kind], whole


def head_dim(config: Any) -> int:
    """Width of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def check_config(family: GgufFamily, config: Any) -> None:
    """Raise :class:`ModelError` with every setting that llama.cpp would compute otherwise."""
    wrong = [*_fixed_values(family, config), *_layer_kinds(family, config), *_scores(family, config)]
    if wrong:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise ModelError(f"llama.cpp would not compute this {config.model_type} as transformers does:\n{lines}")


def activation(config: Any) -> str:
    """Of the MLP, whatever its family calls it."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _fixed_values(family: GgufFamily, config: Any) -> list[str]:
    found = [
        f"{name} = {getattr(config, name, None)!r}, and it has {values[0]!r} only"
        for name, values in family.fixed.items()
        if getattr(config, name, None) not in values
    ]
    if activation(config) not in family.activations:
        found.append(f"its MLP has {activation(config)}, and llama.cpp computes {family.activations[0]}")
    filled = head_dim(config) * int(config.num_attention_heads)
    if family.heads_fill and filled != config.hidden_size:
        found.append(f"its heads are {filled} wide together, and llama.cpp takes d_model, {config.hidden_size}")
    missing = [name for name in family.scalars if getattr(config, name, None) is None]
    return found + [f"{name} is not set, and llama.cpp would take a value of its own" for name in missing]


def _layer_kinds(family: GgufFamily, config: Any) -> list[str]:
    n_layers = int(config.num_hidden_layers)
    found = []
    if family.window == "pattern":
        period = family.full_period
        expected = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(n_layers)]
        if list(config.layer_types) != expected:
            found.append(f"its sliding windows are not in all layers but every {period}th (layer_types)")
    if family.bare_period:
        ropes = [int((i + 1) % family.bare_period != 0) for i in range(n_layers)]
        if list(config.no_rope_layers) != ropes:
            found.append(f"rotary positions are not left out in every {family.bare_period}th layer (no_rope_layers)")
    return found


def _scores(family: GgufFamily, config: Any) -> list[str]:
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if scalar is None:
        return []
    mean = int(config.hidden_size) // int(config.num_attention_heads)
    expected = mean if int(config.num_hidden_layers) == family.mean_head_layers else head_dim(config)
    if scalar == expected:
        return []
    return [f"query_pre_attn_scalar = {scalar}, and llama.cpp divides the scores by the root of {expected}"]
