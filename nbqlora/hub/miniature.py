"""A model of the same family with small sizes and random weights: what a probe needs before any download.

The class, the kinds of layers, the norms, caps, sinks and windows are the model's own; only widths, heads,
experts, layers and the vocabulary shrink, and a window shrinks so far that it shows. A family whose config
cannot be shrunk this way gives none, and the probe waits for the loaded model.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

VOCAB = 512
WINDOW = 4
MAX_LAYERS = 8
MIN_WIDTH = 64
MAX_PARAMS = 120_000_000
# Sizes that a family ties to each other by products: divided by the same number they stay consistent.
TIED = (
    "hidden_size", "n_embd", "d_model", "num_attention_heads", "n_head", "n_heads", "num_heads", "mamba_n_heads",
    "mamba_d_ssm", "lru_width", "linear_num_key_heads", "linear_num_value_heads", "word_embed_proj_dim",
    "attention_hidden_size",
)  # fmt: skip
WIDTHS = ("hidden_size", "n_embd", "d_model")
# Sizes of their own.
FREE = (
    "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "moe_intermediate_size", "shared_intermediate_size",
    "shared_expert_intermediate_size", "hidden_size_per_layer_input",
)  # fmt: skip
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")


def miniature(config: Any, *, trust_remote_code: bool = False) -> Any | None:
    """A small model of this config's family on the CPU in fp32, or None where its config cannot be shrunk.

    Args:
        config: transformers' config of the whole model; it is not changed.
    """
    from transformers import AutoModelForCausalLM

    for small in _shrunk(config.get_text_config()):
        try:
            with torch.device("meta"):
                shape = AutoModelForCausalLM.from_config(small, trust_remote_code=trust_remote_code)
            if sum(p.numel() for p in shape.parameters()) > MAX_PARAMS:
                continue
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                torch.manual_seed(0)
                model = AutoModelForCausalLM.from_config(small, trust_remote_code=trust_remote_code).float()
                model(input_ids=torch.arange(1, 6)[None], use_cache=False)
                return model
        except (ValueError, TypeError, AttributeError, KeyError, IndexError, ZeroDivisionError, RuntimeError):
            # Sizes that this family does not take together; the next ones may do.
            continue
    return None


def _shrunk(config: Any) -> Iterator[Any]:
    """Configs to try, the smallest first."""
    plain = config.to_dict()
    sizes = {name: plain[name] for name in TIED if isinstance(plain.get(name), int)}
    common = math.gcd(*sizes.values())
    # Narrower than this a model mixes too little for a leak to show.
    largest = max((sizes[name] for name in WIDTHS if name in sizes), default=MIN_WIDTH) // MIN_WIDTH
    for divisor in (d for d in range(min(common, max(1, largest)), 0, -1) if common % d == 0):
        try:
            yield _divided(config, divisor)
        except (ValueError, TypeError):  # a config class that checks what it is given
            continue


def _divided(config: Any, divisor: int) -> Any:
    plain = copy.deepcopy(config.to_dict())
    plain.pop("quantization_config", None)
    for name in (*TIED, *FREE):
        if isinstance(plain.get(name), int):
            plain[name] = plain[name] // divisor if name in TIED else max(8, plain[name] // divisor)
    if isinstance(plain.get("num_key_value_heads"), int):
        fewer = max(1, plain["num_key_value_heads"] // divisor)
        plain["num_key_value_heads"] = math.gcd(plain.get("num_attention_heads", fewer), fewer)
    plain["vocab_size"] = VOCAB
    for name in TOKENS:
        plain[name] = 0 if plain.get(name) is not None else None
    for name in WINDOWS:
        if isinstance(plain.get(name), int):
            plain[name] = WINDOW
    for name in EXPERTS:
        if isinstance(plain.get(name), int):
            plain[name] = max(2, min(4, plain[name]))
    for name in ("num_experts_per_tok", "top_k_experts"):
        if isinstance(plain.get(name), int):
            plain[name] = min(2, plain[name])
    for name in ("initializer_range", "init_std"):
        if name in plain:
            plain[name] = 0.1  # so wide that a leak shows
    plain |= _layers(plain)
    return type(config).from_dict({**plain, "dtype": "float32"})


def _layers(plain: dict[str, Any]) -> dict[str, Any]:
    """As many layers as hold each kind once, at least two."""
    name = next((n for n in LAYERS if isinstance(plain.get(n), int)), None)
    if name is None:
        return {}
    kinds = plain.get("layer_types") or plain.get("layers_block_type")
    if isinstance(kinds, list) and kinds:
        needed = 1 + max(kinds.index(kind) for kind in set(kinds))
        count = min(plain[name], max(2, needed))
    else:
        # Hybrids that name their attention layers by a period or an index have one within the first eight.
        mixed = any(k in plain for k in ("attn_layer_period", "attn_layer_indices", "hybrid_override_pattern"))
        count = min(plain[name], MAX_LAYERS if mixed else 2)
    cut: dict[str, Any] = {k: v[:count] for k, v in plain.items() if isinstance(v, list) and len(v) == plain[name]}
    pattern = plain.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        cut["hybrid_override_pattern"] = pattern[:count]
    indices = plain.get("attn_layer_indices")
    if isinstance(indices, list):
        cut["attn_layer_indices"] = [i for i in indices if i < count]
    return {**cut, name: count}
