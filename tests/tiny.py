"""Tiny models with random weights, a byte tokenizer with a chat template, and rows to train on.

Everything real except the size: transformers' own classes, saved as folders that ``model = "<folder>"`` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

VOCAB = 300
D_MODEL = 64
LAYERS = 3
PAD, BOS, START, END = "<|pad|>", "<|bos|>", "<|im_start|>", "<|im_end|>"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 259,
}
# What makes each family a case of its own: biases, norms, windows, what happens to the logits.
FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"head_dim": 16, "final_logit_softcapping": 0.5, "sliding_window": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "sliding_window": 16, "tie_word_embeddings": True},
    "phi3": {},
    "ministral": {
        "head_dim": 16,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "seed_oss": {"head_dim": 32, "attention_dropout": 0.0, "residual_dropout": 0.0},
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "granite": {"logits_scaling": 0.25, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 4.0, "tie_word_embeddings": True},
}


def make_model(family: str = "llama", *, seed: int = 0, **changes: Any) -> Any:
    """A decoder of this family in fp32 with random weights, wide enough that its loss is not flat."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**_SHAPE, "initializer_range": 0.08, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def with_lora(model: Any, *, r: int = 4, seed: int = 0, **changes: Any) -> Any:
    """LoRA on all linears; B is random too, as after some steps, so that every gradient is there."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes}
    model = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.05)
    return model


def make_tokenizer(*, chat: bool = True) -> Any:
    """One token a byte, four special ones, ChatML."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in (PAD, BOS, START, END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token=PAD, bos_token=BOS, eos_token=END)
    if chat:
        tokenizer.chat_template = TEMPLATE
    return tokenizer


def save_model(folder: Path, family: str = "llama", *, bad_token: str = "", **changes: Any) -> Path:
    """Save model and tokenizer.

    Args:
        bad_token: one character whose embedding becomes infinite: a row with it has no finite loss.
    """
    model, tokenizer = make_model(family, **changes), make_tokenizer()
    if bad_token:
        (index,) = tokenizer(bad_token)["input_ids"]
        model.get_input_embeddings().weight.data[index] = float("inf")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_nf4(folder: Path, *, dtype: torch.dtype = torch.float32, double: bool = True) -> Any:
    """The saved model in NF4 with double quantization on the CPU, as ``nbqlora.hub.load`` asks for it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=nf4, device_map={"": "cpu"}, dtype=dtype)


def make_rows(n: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Conversations of different lengths, about 30 to 70 tokens."""
    words = ["sun", "moon", "river", "stone", "bird", "cloud", "tree", "salt"]
    numbers = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(n):
        picked = [words[int(i)] for i in torch.randint(len(words), (6,), generator=numbers)]
        ask, answer = (int(i) for i in torch.randint(1, 4, (2,), generator=numbers))
        turns = [("user", " ".join(picked[:ask])), ("assistant", " ".join(picked[3 : 3 + answer]))]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    return rows


def lora_parameters(model: Any) -> dict[str, torch.Tensor]:
    """The trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def padded_batch(*, rows: int = 2, seq: int = 24, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids with padding on the right, the first third of each row without loss."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, seq), generator=numbers)
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, seq - 5 * row :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : seq // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def packed_batch(*, lengths: tuple[int, ...] = (9, 14, 5), seed: int = 0) -> dict[str, torch.Tensor]:
    """Documents one after another in a row; ``position_ids`` restart at each."""
    numbers = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (1, sum(lengths)), generator=numbers)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
