"""What a model is, from its config alone: no weights are read, nothing is allocated.

The model class is built on the meta device, so the counts are the class's own for any architecture that
transformers knows, not a formula for each family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.core.specs import HeadSpec, ModelSpec
from nbqlora.hub.access import download_bytes, find_model, local_folder, sentence
from nbqlora.hub.formats import check_formats
from nbqlora.hub.reach import answer_of


def locate(name: str, say: Callable[[str], None] = lambda line: None) -> str:
    """Where a model is: the folder ``name``, else its name on the hub, else its copy in the hub's cache.

    Args:
        say: takes a line when the copy is used because the hub does not give the model.

    Raises:
        ModelError: there is no such folder or model, it may not be read, or its weights are only a pickle; said
            within seconds.
    """
    location = local_folder(name) or find_model(name, say)
    check_formats(name, location)
    return location


def read_tokenizer(location: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer, from a folder or the hub. Raises :class:`ModelError`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(location, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_reason(location, error, "tokenizer")) from error


def read_spec(name: str, location: str, *, trust_remote_code: bool = False) -> ModelSpec:
    """The model's shape.

    Args:
        name: as the user gave it, kept for plans and reports.
        location: a folder or a hub id.

    Raises:
        ModelError: it does not exist, may not be read, is no decoder, or is stored in a format that cannot
            be trained.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(location, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(_reason(name, error, "config")) from error
    quantized = _check_quantization(name, config)
    return _spec(name, location, config.get_text_config(), model, quantized)


def _check_quantization(name: str, config: Any) -> bool:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return False
    plain = stored if isinstance(stored, Mapping) else stored.to_dict()
    method = str(plain.get("quant_method", "unknown")).lower()
    if "bitsandbytes" not in method or not plain.get("load_in_4bit"):
        raise ModelError(f"{name} is stored as {method}; QLoRA here needs the original weights, or bitsandbytes 4-bit")
    return True


def _spec(name: str, location: str, config: Any, model: Any, quantized: bool) -> ModelSpec:
    head = model.get_output_embeddings()
    n_layers = int(config.num_hidden_layers)
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
    # Some families keep lists of other things before their layers; some have fewer layers in it than they count.
    layers = next((m for m in lists if len(m) == n_layers), next((m for m in lists if len(m) > 1), None))
    shapes: dict[str, tuple[int, int]] = {}
    n_linear = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            n_linear += module.weight.numel()
    for path, module in layers[0].named_modules() if layers is not None else ():
        if isinstance(module, torch.nn.Linear):
            shapes[path.rsplit(".", 1)[-1]] = (module.out_features, module.in_features)
    # State-space models have no attention; their heads, if any, go by another name.
    n_heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "num_heads", None) or 1)
    d_model = int(config.hidden_size)
    return ModelSpec(
        name=name,
        architecture=str(config.model_type),
        n_layers=n_layers,
        d_model=d_model,
        d_ff=int(getattr(config, "intermediate_size", None) or 4 * d_model),
        n_heads=n_heads,
        n_kv_heads=int(getattr(config, "num_key_value_heads", None) or n_heads),
        head_dim=int(getattr(config, "head_dim", None) or d_model // n_heads),
        vocab_size=int(config.vocab_size),
        n_params=sum(p.numel() for p in model.parameters()),
        n_linear_params=n_linear,
        linear_shapes=shapes,
        head=_head(config, head),
        quantized=quantized,
        mlp_alone=layers is not None and all(isinstance(getattr(x, "mlp", None), torch.nn.Module) for x in layers),
        max_positions=getattr(config, "max_position_embeddings", None),
        download_bytes=None if Path(location).is_dir() else download_bytes(location),
    )


def _head(config: Any, head: Any) -> HeadSpec:
    return HeadSpec(
        tied=bool(getattr(config, "tie_word_embeddings", False)),
        bias=getattr(head, "bias", None) is not None,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
        logit_divisor=float(getattr(config, "logits_scaling", None) or 1.0),
        logit_factor=float(getattr(config, "logit_scale", None) or 1.0),
    )


def _reason(name: str, error: Exception, what: str) -> str:
    text = str(error)
    first = (text.strip().splitlines() or [type(error).__name__])[0]
    if "trust_remote_code" in text:
        return f"{name} brings its own code, which runs on your machine; set trust_remote_code = true if you trust it"
    answer = answer_of(error)
    return sentence(name, answer) if answer else f"cannot read the {what} of {name}: {first}"
