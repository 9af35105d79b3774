"""An adapter's folder as arithmetic: what each tensor of the base becomes.

Only what is understood is merged. A LoRA's formula is decided by a handful of fields of its config; a field that
changes the formula in another way and is set to anything but its default is an error before a byte is written,
since a merge that ignores it would be wrong in silence.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nbqlora.core.errors import ModelError
from nbqlora.hub.stored import Stored, StoredTensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Fields that decide the formula and are understood, or say nothing about it.
UNDERSTOOD = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out", "lora_dropout",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "bias",
    "init_lora_weights", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
})  # fmt: skip
# These change the base itself before training, so the adapter fits no base that anybody has.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class Delta:
    """``scale * B A`` for one weight.

    Args:
        a: ``[r, n_in]``. For an embedding ``[r, vocab]``.
        b: ``[n_out, r]``. For an embedding ``[d_model, r]``.
        magnitude: DoRA's, ``[n_out]``; None without.
        transposed: the weight is stored ``[n_in, n_out]`` (GPT-2), or belongs to an embedding.
    """

    a: Stored
    b: Stored
    scale: float
    magnitude: Stored | None = None
    transposed: bool = False

    def factors(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``left [rows, r]`` and ``right [r, columns]`` in fp32, whose product is what the stored weight gains."""
        a, b = (t.read().to(device, torch.float32) for t in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return left.mul(self.scale), right.contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """Of the stored weight."""
        n_out, n_in = self.b.shape[0], self.a.shape[1]
        return (n_in, n_out) if self.transposed else (n_out, n_in)


@dataclass(frozen=True, kw_only=True)
class AdapterFiles:
    """What an adapter does, by module.

    Args:
        deltas: by the module's path in the model, ``model.layers.0.self_attn.q_proj``.
        replaced: whole tensors that stand in the adapter, by the parameter's path; a delta comes on top.
    """

    folder: Path
    config: Mapping[str, Any]
    deltas: Mapping[str, Delta] = field(repr=False)
    replaced: Mapping[str, Stored] = field(repr=False)


def read_adapter(folder: Path) -> AdapterFiles:
    """Read an adapter's config and the places of its tensors.

    Raises:
        ModelError: it is no LoRA adapter in safetensors, or it is of a kind that cannot be merged; with the reason.
    """
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder} holds no adapter: it has no {CONFIG}{_inner(folder)}")
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; adapters in other formats are not read")
    try:
        config = json.loads((folder / CONFIG).read_text("utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / CONFIG} is not JSON") from error
    _check_kind(folder, config)
    tensors = StoredTensors([folder / WEIGHTS])
    deltas: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for name, stored in tensors.items():
        path, part = _parted(name)
        if part is None:
            replaced[path] = stored
        else:
            deltas.setdefault(path, {})[part] = stored
    found = {path: _delta(folder, path, parts, config) for path, parts in deltas.items()}
    return AdapterFiles(folder=folder, config=config, deltas=found, replaced=replaced)


def _inner(folder: Path) -> str:
    """The adapters in folders inside, as PEFT saves several."""
    inner = sorted(f.parent.name for f in folder.glob(f"*/{CONFIG}"))
    return f"; the folders {', '.join(inner)} in it do: give one of them, or a list" if inner else ""


def _check_kind(folder: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise ModelError(f"{folder} holds an adapter of kind {kind}; only LoRA (with or without DoRA) can be merged")
    odd = sorted(k for k, v in config.items() if k not in UNDERSTOOD and v not in (None, False, [], {}, ""))
    if odd:
        raise ModelError(
            f"the adapter in {folder} uses {', '.join(odd)}, which merging does not know; nothing was written"
        )
    how = str(config.get("init_lora_weights")).lower()
    if how.startswith(CHANGES_BASE):
        raise ModelError(
            f"the adapter in {folder} began as {how}, which changes the base too: convert it with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )


def _parted(name: str) -> tuple[str, str | None]:
    """``base_model.model.X.lora_A.weight`` -> ``X``, ``a``; the part is None for a tensor that was trained whole."""
    path = name.removeprefix(PREFIX)
    for ending, part in (
        (".lora_A.weight", "a"), (".lora_B.weight", "b"), (".lora_embedding_A", "embedding_a"),
        (".lora_embedding_B", "embedding_b"), (".lora_magnitude_vector", "magnitude"),
        (".lora_magnitude_vector.weight", "magnitude"), (".lora_B.bias", "bias"), (".lora_A.bias", "bias"),
    ):  # fmt: skip
        if path.endswith(ending):
            return path.removesuffix(ending), part
    # An adapted embedding brings its base along; so does a bias that was trained.
    return path.replace(".base_layer.", "."), None


def _delta(folder: Path, path: str, parts: Mapping[str, Stored], config: Mapping[str, Any]) -> Delta:
    names, is_embedding = frozenset(parts), "embedding_a" in parts
    a, b = ("embedding_a", "embedding_b") if is_embedding else ("a", "b")
    if not {a, b} <= names or names - {a, b, "magnitude"}:
        has = ", ".join(sorted(names))
        raise ModelError(f"the adapter in {folder} has {has} for {path}; a LoRA has A and B, and no bias can be merged")
    if is_embedding and "magnitude" in parts:
        raise ModelError(f"the adapter in {folder} has DoRA on the embedding {path}, which merging does not know")
    if bool(config.get("use_dora")) != ("magnitude" in parts):
        raise ModelError(f"the adapter in {folder}: use_dora is {config.get('use_dora')}, and {path} says otherwise")
    if len(parts[a].shape) != 2 or len(parts[b].shape) != 2 or parts[a].shape[0] != parts[b].shape[1]:
        raise ModelError(f"the adapter in {folder}: A {parts[a].shape} and B {parts[b].shape} of {path} do not fit")
    rank, alpha = (_patterned(path, config, key) for key in ("r", "lora_alpha"))
    if rank != parts[a].shape[0]:
        raise ModelError(f"the adapter in {folder}: {path} has rank {parts[a].shape[0]}, and its config says {rank:g}")
    transposed = is_embedding or bool(config.get("fan_in_fan_out"))
    if transposed and "magnitude" in parts:
        raise ModelError(f"the adapter in {folder} has DoRA on {path}, which is stored transposed: not known here")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Delta(a=parts[a], b=parts[b], scale=scale, magnitude=parts.get("magnitude"), transposed=transposed)


def _patterned(path: str, config: Mapping[str, Any], key: str) -> float:
    """``r`` or ``lora_alpha`` of a module, which a pattern may set apart."""
    patterns = config.get("rank_pattern" if key == "r" else "alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(value)
    return float(config[key])
