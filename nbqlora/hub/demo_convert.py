"""The demo model's GGUF -> a folder that ``from_pretrained`` reads.

Each tensor is read by ``gguf``, made bf16 and renamed; the files beside it are plain JSON. transformers' own
``gguf_file=`` does this too, but 5.23 takes 25 s and 0.9 GiB for it, warns, refuses to save a model that it had
kept packed (another release dequantizes), leaves ``model_max_length`` open, and reads the tokenizer without the
digit splitting that SmolLM2 was trained with. Weights are bit-equal to what it reads (a test checks) and the
same bytes under every version of transformers.

The config is written out, since the bytes of the GGUF are pinned: there is nothing to discover in them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HEAD_DIM = 64
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": HEAD_DIM, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-05, "rope_theta": 100000.0, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
}  # fmt: skip
# 2 is <|im_end|>, which ends an answer in the chat template: generate() stops there.
GENERATION_CONFIG = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192, "clean_up_tokenization_spaces": False,
    "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>",
}  # fmt: skip
HF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL_TOKEN = 3


def convert(source: Path, folder: Path) -> None:
    """Write config, tokenizer, chat template and bf16 safetensors of the GGUF ``source`` into a new ``folder``."""
    from gguf import GGUFReader

    folder.mkdir()
    reader = GGUFReader(source)
    fields = {key: field.contents() for key, field in reader.fields.items() if key.startswith("tokenizer.")}
    texts = {
        "config.json": json.dumps(CONFIG, indent=2),
        "generation_config.json": json.dumps(GENERATION_CONFIG, indent=2),
        "tokenizer_config.json": json.dumps(TOKENIZER_CONFIG, indent=2),
        "tokenizer.json": json.dumps(_tokenizer(fields), ensure_ascii=False),
        "chat_template.jinja": fields["tokenizer.chat_template"],
    }
    for name, text in texts.items():
        (folder / name).write_text(text, "utf-8", newline="\n")
    _write_weights(reader, folder / "model.safetensors")
    # safetensors makes its file private (0600); a shared cache needs what the umask grants.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def _write_weights(reader: Any, path: Path) -> None:
    import torch
    from gguf import dequantize
    from safetensors.torch import save_file

    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        *block, part, suffix = tensor.name.split(".")
        if part in ("attn_q", "attn_k"):
            # llama.cpp interleaves the two rotary halves of each head's rows; transformers keeps them apart.
            values = values.reshape(-1, HEAD_DIM // 2, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        prefix = f"model.layers.{block[1]}." if block else ""
        # A copy, since unquantized tensors are views of the read-only file.
        tensors[f"{prefix}{HF_NAMES[part]}.{suffix}"] = torch.from_numpy(values.copy()).to(torch.bfloat16)
    save_file(tensors, path, metadata={"format": "pt"})


def _tokenizer(fields: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer.json`` from the GGUF's fields; digits are split one by one (``tokenizer.ggml.pre = smollm``)."""
    tokens = fields["tokenizer.ggml.tokens"]
    control = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == CONTROL_TOKEN]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    digits = {"type": "Digits", "individual_digits": True}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "post_processor": None,
        "added_tokens": [{"id": i, "content": tokens[i], **plain} for i in control],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, as_bytes]},
        "decoder": as_bytes,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in fields["tokenizer.ggml.merges"]],
        },
    }  # fmt: skip
