"""What stands from the first step to the last: weights, adapters, their gradients and states, workspaces."""

from __future__ import annotations

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.specs import DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB, MIB
from nbqlora.planner import shards

# NF4 with double quantization: half a byte, one uint8 scale a block of 64, one fp32 scale of 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Two states in fp32; or in a byte each, with an fp32 scale for 256 of them.
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2 * (1 + 4 / 256)}
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the allocator cannot use because of its own granularity; the default reserve of a card.
FRAGMENTATION_BYTES = GIB // 2


def choose_dtype(asked: str, device: DeviceSpec) -> str:
    """``auto``: fp32 on a CPU, bf16 where the card has it, fp16 below capability 8.0."""
    return auto_dtype(device.kind, device.has_bf16) if asked == "auto" else asked


def auto_dtype(kind: str, has_bf16: bool) -> str:
    """What ``auto`` means on a device of this kind (``cpu`` or ``cuda``)."""
    if kind == "cpu":
        return "fp32"
    return "bf16" if has_bf16 else "fp16"


def targets(model: ModelSpec, config: FinetuneConfig) -> set[str]:
    """Names of the linears that get an adapter."""
    names = set(model.linear_shapes)
    if config.target_modules == "all-linear":
        return names
    asked = config.target_modules
    return names & set([asked] if isinstance(asked, str) else asked)


def adapter_params(model: ModelSpec, config: FinetuneConfig) -> int:
    """LoRA parameters: ``r * (in + out)`` for each targeted linear of each layer."""
    return model.n_layers * sum(config.lora_r * sum(model.linear_shapes[n]) for n in targets(model, config))


def quantized(model: ModelSpec, config: FinetuneConfig) -> bool:
    """The layers' linears are NF4."""
    return config.load_in_4bit or model.quantized


def weight_bytes(model: ModelSpec, config: FinetuneConfig, c: int) -> int:
    """The frozen base: linears in NF4, everything else (embeddings, head, norms) in a dtype of ``c`` bytes.

    Where NF4 is split over cards: one card's share of it, and the layers that are gathered.
    """
    if not quantized(model, config):
        return model.n_params * c
    n = shards.shards_of(config)
    on_host = model.vocab_size * model.d_model * c if model.embedding_on_host else 0
    whole = int(model.n_linear_params * NF4_BYTES) + (model.n_params - model.n_linear_params) * c
    return whole - on_host - shards.spared_bytes(model, n) + shards.gathered_bytes(model, n)


def standing_bytes(config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, c: int) -> dict[MemoryCategory, int]:
    """All of it by category; adapters and gradients are fp32, whatever the dtype."""
    n, m = adapter_params(model, config), MemoryCategory
    on_cpu = device.kind == "cpu"
    return {
        m.WEIGHTS: weight_bytes(model, config, c),
        m.ADAPTER: n * 4,
        m.GRADIENTS: n * 4,
        m.OPTIMIZER: int(n * OPTIMIZER_BYTES[config.optim]),
        m.CONTEXT: device.context_bytes if on_cpu else _workspace_bytes(device),
    }


def _workspace_bytes(device: DeviceSpec) -> int:
    """Workspaces of cuBLAS, which torch allocates: one for the forward's thread, one for the backward's.

    torch's defaults are 32 MiB each from capability 9.0, 8.1 below; 64.0 MiB were left on an H100 after a run. Each
    stream has its own, but those of eager steps are given back before a step is captured.
    """
    return 2 * (32 * MIB if (device.capability or (0, 0)) >= (9, 0) else 4096 * 2 * 1024 + 16 * 8 * 1024)
