"""What makes two runs the same one: everything that decides its steps but for rounding.

A checkpoint carries its run's identity. One run goes on in the steps of another only where all of it
agrees; what the machine decides (card, dtype, how a step is split into micro-batches, what layers keep) may
change between two parts, and is said.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plain import plain
from nbqlora.core.plan import Plan
from nbqlora.core.specs import BatchLayout, DataStats
from nbqlora.core.units import format_count
from nbqlora.hub.demo_model import DEMO_NAME

OPTIONS = (
    "load_in_4bit", "max_length", "assistant_only_loss", "learning_rate", "lr_scheduler_type", "warmup_ratio",
    "weight_decay", "max_grad_norm", "optim", "lora_r", "lora_alpha", "lora_dropout", "target_modules", "seed",
)  # fmt: skip
# Fields of SFTConfig that decide what is shown, when it is evaluated or how fast rows come, not what is learned.
FREE_TRL = frozenset({
    "output_dir", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "log_level", "log_level_replica", "log_on_each_node", "logging_first_step", "logging_steps", "logging_strategy",
    "disable_tqdm", "save_total_limit",
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_accumulation_steps",
    "per_device_eval_batch_size", "eval_do_concat_batches", "batch_eval_metrics", "include_for_metrics",
    "include_num_input_tokens_seen", "skip_memory_metrics", "torch_empty_cache_steps", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers",
})  # fmt: skip
_MARK_BYTES = 1 << 16


def identity(config: FinetuneConfig, plan: Plan, location: str, tokenizer: Any) -> dict[str, Any]:
    """The identity of a run, as JSON holds it.

    Args:
        location: the model's folder, or its hub id.
    """
    lasts = "max_steps" if config.max_steps > 0 else "num_train_epochs"
    return {
        "model": _model(config, plan, location),
        "tokenizer": _tokenizer(tokenizer),
        "data": _data(plan.data),
        "packing": _packing(plan.data),
        "effective_batch_size": plan.effective_batch_size,
        lasts: plain(getattr(config, lasts)),
        **{name: plain(getattr(config, name)) for name in OPTIONS},
        **{f"trl.{name}": plain(value) for name, value in config.trl.items() if name not in FREE_TRL},
        **{f"peft.{name}": plain(value) for name, value in config.peft.items()},
    }


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for each thing that differs, ``learning_rate  0.0002 -> 0.001``; none for the same run."""
    told = [(key, _difference(key, then.get(key), now.get(key))) for key in [*now, *(k for k in then if k not in now)]]
    told = [(key, text) for key, text in told if text]
    width = max((len(key) for key, _ in told), default=0)
    return tuple(f"{key:<{width}}  {text}" for key, text in told)


def _difference(key: str, then: Any, now: Any) -> str:
    if then == now:
        return ""
    if key == "model" and then and now:
        return _model_difference(then, now)
    if key == "data" and then and now:
        return _data_difference(then, now)
    return f"{_shown(then)} -> {_shown(now)}"


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _model(config: FinetuneConfig, plan: Plan, location: str) -> dict[str, Any]:
    spec = plan.model
    folder = Path(location)
    local = folder.is_dir() and config.model != DEMO_NAME
    return {
        "name": config.model,
        "n_params": spec.n_params,
        "architecture": spec.architecture,
        "shape": [spec.n_layers, spec.d_model, spec.d_ff, spec.n_heads, spec.n_kv_heads, spec.vocab_size],
        "quantized": spec.quantized,
        "files": _files_mark(folder) if local else "",
        "revision": "" if folder.is_dir() else _revision(location),
    }


def _model_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A folder may lie elsewhere with the same files; a hub model's commit may not be known yet."""
    free = {"name"} if then["files"] and now["files"] else set()
    free |= {"revision"} if not (then["revision"] and now["revision"]) else set()
    other = [key for key in now if key not in free and then.get(key) != now[key]]
    if not other:
        return ""
    words = [f"{model['name']} ({format_count(model['n_params'])} parameters)" for model in (then, now)]
    if words[0] != words[1]:
        return " -> ".join(words)
    return f"{now['name']}: its {'files' if other == ['files'] else other[0]} changed"


def _files_mark(folder: Path) -> str:
    """Names, sizes, first and last bytes of a folder's weight files: milliseconds, however large they are."""
    mark = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with file.open("rb") as opened:
            mark.update(f"{file.name} {size} ".encode() + opened.read(_MARK_BYTES))
            opened.seek(max(0, size - _MARK_BYTES))
            mark.update(opened.read())
    return mark.hexdigest()[:16]


def _revision(name: str) -> str:
    """The commit of a hub model whose config is cached; "" when it is not."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else ""


def _tokenizer(tokenizer: Any) -> str:
    template = hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest()[:8]
    return f"{len(tokenizer)} tokens, template {template}"


def _data(stats: DataStats) -> dict[str, Any]:
    counts = {name: getattr(stats, name) for name in ("n_rows", "n_tokens", "n_supervised_tokens")}
    return {**counts, "fingerprint": stats.fingerprint}


def _data_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    words = [f"{data['n_rows']} rows, {format_count(data['n_tokens'])} tokens" for data in (then, now)]
    if words[0] != words[1]:
        return " -> ".join(words) + "; the rows differ"
    known = then["fingerprint"] and now["fingerprint"]
    same = all(then[key] == now[key] for key in now if known or key != "fingerprint")
    return "" if same else f"{words[0]}: other rows, another order, or other tokens are learned"


def _packing(stats: DataStats) -> str:
    packed = stats.layout is BatchLayout.PACKED or stats.n_sequences != stats.n_rows
    return f"{stats.n_sequences} packs" if packed else "off"
