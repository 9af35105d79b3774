"""Adapters of all kinds on tiny bases, saved by PEFT, and what PEFT itself makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.merged import MergeReport
from nbqlora.run.merging import MergeSettings, merge
from nbqlora.run.sources import MergeSource
from tests import tiny

# Family, and what is particular about the adapter.
CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    **{family: (family, {}) for family in ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3")},
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
    "some targets": ("llama", {"target_modules": ["q_proj", "down_proj"]}),
    "rank-stabilized": ("llama", {"use_rslora": True, "lora_alpha": 3}),
    "ranks and alphas by pattern": (
        "llama",
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"k_proj": 5}},
    ),
    "DoRA": ("llama", {"use_dora": True}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "a head trained whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "biases": ("qwen2", {"bias": "all"}),
    "tied, embedding": ("gemma2", {"target_modules": ["embed_tokens", "q_proj"]}),
    "tied, head": ("gemma2", {"target_modules": ["lm_head", "q_proj"]}),
}


def save_base(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, shards: str = "100GB", **changes: Any
) -> Path:
    """A tiny base with its tokenizer."""
    tiny.make_model(family, **changes).to(dtype).save_pretrained(folder, max_shard_size=shards)
    tiny.make_tokenizer().save_pretrained(folder)
    return folder


def save_lora(base: Path, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """An adapter with random A and B on a base, saved by PEFT."""
    from transformers import AutoModelForCausalLM

    model = tiny.with_lora(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), seed=seed, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_embedding_A" in name or "lora_embedding_B" in name:
                parameter.normal_(0, 0.1)
            elif "magnitude" in name:
                parameter.mul_(1.2)
            elif "modules_to_save.default" in name or (name.endswith("bias") and parameter.requires_grad):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def peft_logits(base: Path, adapters: list[Path], ids: torch.Tensor) -> torch.Tensor:
    """What base and adapters say together."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    wrapped = PeftModel.from_pretrained(model, str(adapters[0]), adapter_name="a0")
    for i, each in enumerate(adapters[1:], start=1):
        wrapped.load_adapter(str(each), adapter_name=f"a{i}")
    wrapped.base_model.set_adapter([f"a{i}" for i in range(len(adapters))])
    with torch.no_grad():
        return wrapped.eval()(input_ids=ids).logits


def plain_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What a folder says that plain transformers loads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def merge_tiny(folder: Path, adapters: list[Path], target: Path, *, model: Any = None, **settings: Any) -> MergeReport:
    """Merge as a run in fp32 would."""
    source = MergeSource(folder=folder, adapters=tuple(adapters), dtype="fp32", model=model)
    return merge(source, target, MergeSettings(**{"dtype": "fp32", **settings}))


def save_as_seen(base: Path, folder: Path) -> Path:
    """The base with each weight that NF4 rounds replaced by what bitsandbytes unpacks.

    Not the quantized model itself: without gradients, its products on a CPU round otherwise than those of training.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit
    from transformers import AutoModelForCausalLM

    packed, plain = tiny.load_nf4(base), AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for path, module in packed.named_modules():
        if isinstance(module, Linear4bit):
            unpacked = dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(path).weight.data.copy_(unpacked)
    plain.save_pretrained(folder)
    return folder
