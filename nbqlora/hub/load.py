"""Files -> a model in NF4 with LoRA adapters, on its device.

NF4 with double quantization stores 0.516 bytes a parameter. ``prepare_model_for_kbit_training`` is not
called: it would make fp32 copies of embeddings and head (1 GiB for 128k x 4096). LoRA stays in fp32; mixed
precision comes from autocast, so that fp16 cards train without underflow in the optimizer.

Where the plan splits the weights over cards, the base is loaded onto the host and dealt out from there
(:mod:`nbqlora.hub.load_sharded`). A model that only talks is whole.

Weights are read from safetensors only: a base or an adapter that has nothing but a pickle is refused by name, before
a library that would open it is called.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from safetensors import SafetensorError

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import ModelError
from nbqlora.core.plan import Plan
from nbqlora.engine.loaded import LoadedModel
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.engine.surgery import keep_linears_trainable
from nbqlora.hub.adapter import check_adapter
from nbqlora.hub.atomic import recover_folder
from nbqlora.hub.formats import check_formats
from nbqlora.hub.load_sharded import QUANT_TYPE, check_can_split, to_cards
from nbqlora.hub.manifest import WEIGHTS
from nbqlora.hub.stored import read_header

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def load(config: FinetuneConfig, plan: Plan, location: str, tokenizer: Any) -> LoadedModel:
    """Load the base and put fresh adapters on it.

    Args:
        location: the folder or hub id that ``hub.inspect.locate`` gave.

    Raises:
        ModelError: the files cannot be read, or LoRA cannot be put on this model, or its weights cannot be split over
            cards as the plan says.
    """
    if plan.shards > 1:
        check_can_split(plan)
    model = _base(plan, location, config.trust_remote_code, split=plan.shards > 1)
    torch.manual_seed(config.seed)
    model = _with_adapters(model, config)
    return _loaded(model, plan, tokenizer)


def load_adapter(config: FinetuneConfig, plan: Plan, location: str, tokenizer: Any, adapter: Path) -> LoadedModel:
    """Load the base with a saved adapter, to talk to it.

    Raises:
        ModelError: the base cannot be read; or the adapter is damaged, with where a whole one is; or it is for
            another model.
    """
    from peft import PeftModel

    recover_folder(adapter)
    check_adapter(adapter)
    model = _base(plan, location, config.trust_remote_code)
    try:
        with quiet_libraries():
            model = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"cannot load the adapter in {adapter}: {str(error).splitlines()[0]}") from error
    _check_complete(model, adapter)
    loaded = _loaded(model, plan, tokenizer)
    loaded.model.eval()
    return loaded


def _check_complete(model: Any, adapter: Path) -> None:
    """PEFT leaves what it finds no weights for as it was made: an adapter that does nothing, without a word."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    missing = own.keys() - read_header(adapter / WEIGHTS).keys()
    if missing:
        raise ModelError(f"the adapter in {adapter} is not for this model: it has no {min(missing)}")


def device_of(plan: Plan) -> torch.device:
    """Where the plan puts the model."""
    return torch.device("cuda", torch.cuda.current_device()) if plan.device.kind == "cuda" else torch.device("cpu")


def _loaded(model: Any, plan: Plan, tokenizer: Any) -> LoadedModel:
    return LoadedModel(
        model=model,
        tokenizer=tokenizer,
        spec=plan.model,
        device=device_of(plan),
        dtype=DTYPES[plan.dtype],
        replacements=keep_linears_trainable(model),
    )


def _base(plan: Plan, location: str, trust_remote_code: bool, *, split: bool = False) -> Any:
    from transformers import AutoModelForCausalLM

    dtype = DTYPES[plan.dtype]
    # A checkpoint that is stored in 4 bits brings its own settings; even None would override them.
    quantize = plan.load_in_4bit and not plan.model.quantized
    check_formats(plan.model.name, location)
    settings: dict[str, Any] = {"quantization_config": _nf4(dtype, leave_all=split)} if quantize else {}
    # As the files have it, what is on the host stays a map of them.
    in_dtype, device = ("auto", torch.device("cpu")) if split else (dtype, device_of(plan))
    try:
        with quiet_libraries(progress_bars=not Path(location).is_dir()):
            model = AutoModelForCausalLM.from_pretrained(
                location,
                device_map={"": device},
                dtype=in_dtype,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                **settings,
            )
    except SafetensorError as error:
        raise ModelError(f"a file of {plan.model.name} is damaged ({error}); {_again(location)}") from error
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {plan.model.name}: {str(error).splitlines()[0]}") from error
    except RuntimeError as error:
        if said := _short_of_memory(error):
            raise torch.OutOfMemoryError(said) from None
        raise
    if split:
        to_cards(model, device_of(plan), dtype)
    _set_compute_dtype(model, dtype)
    model.config.use_cache = False
    return model


def _short_of_memory(error: RuntimeError) -> str:
    """What the card said, where transformers noted it among a weight's errors and raises another behind them; or ""."""
    at = error.__traceback__
    while at is not None:
        noted = getattr(at.tb_frame.f_locals.get("loading_info"), "conversion_errors", {})
        for text in noted.values():
            if found := re.search(r"CUDA out of memory[^\n]*", text):
                return found[0]
        at = at.tb_next
    return ""


def _again(location: str) -> str:
    """How to get whole files."""
    if Path(location).is_dir():
        return f"copy {location} again"
    return f"remove its copy from the hub's cache, {constants.HF_HUB_CACHE}, and it is downloaded again"


def _nf4(dtype: torch.dtype, *, leave_all: bool) -> Any:
    """How linears are quantized on loading; ``leave_all`` leaves them to :func:`to_cards`, layer by layer."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=QUANT_TYPE,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["model", "lm_head"] if leave_all else None,
    )


def _set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """A checkpoint stored in 4 bits carries the dtypes of the card it was made on: set this run's."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.compute_dtype = dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and not isinstance(parameter, Params4bit):
            parameter.data = parameter.data.to(dtype)


def _with_adapters(model: Any, config: FinetuneConfig) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    try:
        lora = LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
            **config.peft,
        )
        return get_peft_model(model, lora)
    except (ValueError, ImportError, TypeError) as error:
        raise ModelError(f"LoRA cannot be put on this model: {str(error).splitlines()[0]}") from error
