"""Tiny models of every family, each with what llama.cpp must get right; and what transformers makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.tiny import make_model, make_tokenizer

LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
OTHER_YARN = {**YARN, "attention_factor": 1.5}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
SHORT_FACTORS, LONG_FACTORS = ([1.0 + step * i for i in range(8)] for step in (0.1, 0.5))


def long_rope(original: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": original,
        "short_factor": SHORT_FACTORS, "long_factor": LONG_FACTORS,
    }  # fmt: skip


def by_layer(full: dict[str, Any], theta: float) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": theta}}


TIED = {"tie_word_embeddings": True}
WINDOWS = {"sliding_window": 16, "num_hidden_layers": 7}
GEMMA = {"head_dim": 16, **TIED}
GEMMA_2 = {**GEMMA, **WINDOWS, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}
GEMMA_3 = {**GEMMA, **WINDOWS, "query_pre_attn_scalar": 16}
GRANITE = {
    "logits_scaling": 0.25, "residual_multiplier": 0.5, "embedding_multiplier": 2.0, "attention_multiplier": 0.2,
}  # fmt: skip

# By name: the family and what is changed.
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", TIED),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, Llama 3": ("llama", {"rope_parameters": LLAMA_3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, YaRN": ("llama", {"rope_parameters": YARN}),
    "llama, YaRN with its own factor": ("llama", {"rope_parameters": OTHER_YARN}),
    "llama, LongRoPE": ("llama", {"rope_parameters": long_rope(256)}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, window": ("mistral", {"sliding_window": 130}),
    "ministral": ("ministral", {"head_dim": 16, "sliding_window": 130, "layer_types": ["full_attention"] * 3}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied head": ("qwen2", TIED),
    "qwen2, YaRN": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3, tied head": ("qwen3", {"head_dim": 32, **TIED}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", {**GEMMA_2, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("gemma3_text", GEMMA_3),
    "gemma3_text, linear": (
        "gemma3_text",
        {**GEMMA_3, "rope_parameters": by_layer({**LINEAR, "rope_theta": 1e6}, 1e4)},
    ),
    "phi3": ("phi3", {"sliding_window": None}),
    "phi3, half a head": ("phi3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    "phi3, LongRoPE": ("phi3", {"original_max_position_embeddings": 256, "rope_parameters": long_rope(256)}),
    "phi3, LongRoPE, long texts": ("phi3", {"original_max_position_embeddings": 32, "rope_parameters": long_rope(32)}),
    "granite": ("granite", GRANITE),
    "olmo2": ("olmo2", {}),
    "olmo2, tied head": ("olmo2", TIED),
    "olmo3": ("olmo3", WINDOWS),
    "olmo3, YaRN": ("olmo3", {**WINDOWS, "rope_parameters": by_layer({**YARN, "rope_theta": 5e5}, 5e5)}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
    "seed_oss": ("seed_oss", {"head_dim": 32}),
    "cohere": ("cohere", {"logit_scale": 4.0, **TIED}),
}
# LongRoPE's short factors hold up to as many tokens; then the context of llama.cpp must end there too.
CONTEXTS = {"llama, LongRoPE": 256, "phi3, LongRoPE": 256}
PROMPT_TOKENS, N_GREEDY = (40, 110), 8


def make(family: str, changes: Mapping[str, Any], *, seed: int = 0) -> Any:
    """A model with random weights, norms included; attention is computed as it is written down."""
    model = make_model(family, seed=seed, attn_implementation="eager", **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        # llama.cpp ends at it, and compared are tokens of the same number: it is never the most likely one.
        model.get_output_embeddings().weight[model.config.eos_token_id] = 0
    return model


def save(folder: Path, family: str, changes: Mapping[str, Any]) -> Path:
    """Such a model and the byte tokenizer, in a folder."""
    make(family, changes).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def prompts(*, seed: int = 0) -> list[list[int]]:
    """Random ids, longer than a window."""
    numbers = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=numbers).tolist() for n in PROMPT_TOKENS]


def logits_along(model: Any, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """transformers' logits at every place of each text, ``[tokens, vocabulary]``."""
    with torch.no_grad():
        return [model(input_ids=torch.tensor([text]), use_cache=False).logits[0] for text in texts]
