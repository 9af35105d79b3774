"""Bytes and seconds of one way to run: the arithmetic of a plan.

Bytes are counted tensor by tensor for the path that runs (transformers' layers, PEFT's 4-bit LoRA,
bitsandbytes, our head loss), not fitted to a measurement: ``layer_bytes`` names every tensor that autograd
saves, and a test holds it against what autograd really saves.
"""

from __future__ import annotations

import math

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB, MIB

# NF4 with double quantization: half a byte, one uint8 scale a block of 64, one fp32 scale of 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2}
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the allocator cannot use because of its own granularity; the default reserve of a card.
FRAGMENTATION_BYTES = GIB // 2
# Logits of one chunk: the product, its fp32 copy and its gradient.
LOSS_CHUNK_BYTES = 256 * MIB
# Stock layers on an H100: 8B 2x2048 took 435 ms where its matmuls need 156 ms at the card's rate, and a
# step never fell below 7 ms a layer, the time the host needs to launch it (1B 4x512: 151 ms, 16 layers;
# 8B 2x512: 214 ms, 32 layers). torch 2.11, transformers 5.17, peft 0.21, bitsandbytes 0.50.2.
MATMUL_SHARE = 0.36
HOST_SECONDS_PER_LAYER = 0.007


def choose_dtype(asked: str, device: DeviceSpec) -> str:
    """``auto``: fp32 on a CPU, bf16 where the card has it, fp16 below capability 8.0."""
    if asked != "auto":
        return asked
    if device.kind == "cpu":
        return "fp32"
    return "bf16" if device.has_bf16 else "fp16"


def adapter_params(model: ModelSpec, config: FinetuneConfig) -> int:
    """LoRA parameters: ``r * (in + out)`` for each targeted linear of each layer."""
    names = set(model.linear_shapes)
    if config.target_modules != "all-linear":
        asked = config.target_modules
        names &= set([asked] if isinstance(asked, str) else asked)
    return model.n_layers * sum(config.lora_r * sum(model.linear_shapes[n]) for n in names)


def layer_bytes(model: ModelSpec, dtype_bytes: int, lora_r: int) -> int:
    """Bytes a token that one decoder layer saves for its backward when it keeps everything.

    ``d`` the width, ``a`` the attention's width (heads x head_dim), ``f`` the MLP's width, ``c`` bytes of
    the training dtype: two norm inputs in fp32 (8d), two normed inputs (2dc), q and the expanded k and v
    (3ac), the attention's output and its contiguous copy (2ac), gate, its activation, up and their product
    (4fc), and the small products of seven adapters (7rc).
    """
    attention = model.n_heads * model.head_dim
    wide = 2 * model.d_model + 5 * attention + 4 * model.d_ff + 7 * lora_r
    return 8 * model.d_model + wide * dtype_bytes


def weight_bytes(model: ModelSpec, dtype_bytes: int, load_in_4bit: bool) -> int:
    """The frozen base: linears in NF4, everything else (embeddings, head, norms) in the training dtype."""
    if not (load_in_4bit or model.quantized):
        return model.n_params * dtype_bytes
    return int(model.n_linear_params * NF4_BYTES) + (model.n_params - model.n_linear_params) * dtype_bytes


def budget(
    config: FinetuneConfig,
    model: ModelSpec,
    device: DeviceSpec,
    dtype: str,
    rows: int,
    row_tokens: int,
    supervised_tokens: int,
    n_keep: int,
) -> MemoryBudget:
    """Predicted bytes at the peak.

    Args:
        rows: rows in one micro-batch.
        row_tokens: tokens of its longest row; padding makes all rows as long.
        supervised_tokens: tokens of the micro-batch that the loss counts.
        n_keep: layers that keep everything.
    """
    c = DTYPE_BYTES[dtype]
    tokens = rows * row_tokens
    kept = layer_bytes(model, c, config.lora_r) * tokens
    n_adapter = adapter_params(model, config)
    stored = n_keep * kept + (model.n_layers - n_keep) * model.d_model * c * tokens
    stored += 4 * model.d_model * c * tokens  # embeddings, the last norm and its fp32 input
    stored += rows * row_tokens * row_tokens * (1 + c)  # the attention mask and its copy in the dtype
    stored += n_adapter * c if c == 2 else 0  # autocast's copies of the adapter
    chunk = min(supervised_tokens, loss_chunk_tokens(model, c))
    loss = chunk * model.vocab_size * (c + 4 + c) + supervised_tokens * model.d_model * 2 * c
    working = (4 * model.d_ff * c + 8 * model.d_model) * tokens + (kept if n_keep < model.n_layers else 0)
    widest = max((n * k for n, k in model.linear_shapes.values()), default=0)
    dequant = int(widest * (c + 4 / 64)) if config.load_in_4bit or model.quantized else 0
    in_loss = loss > working + dequant
    m = MemoryCategory
    parts = {
        m.WEIGHTS: weight_bytes(model, c, config.load_in_4bit),
        m.ADAPTER: n_adapter * 4,
        m.GRADIENTS: n_adapter * 4,
        m.OPTIMIZER: n_adapter * OPTIMIZER_BYTES[config.optim],
        m.ACTIVATIONS: stored + (0 if in_loss else working),
        m.LOSS: loss if in_loss else 0,
        m.DEQUANT: 0 if in_loss else dequant,
        m.CONTEXT: device.context_bytes if device.kind == "cpu" else 0,
    }
    return MemoryBudget(by_category={k: v for k, v in parts.items() if v})


def loss_chunk_tokens(model: ModelSpec, dtype_bytes: int) -> int:
    """Supervised tokens whose logits exist at once: a power of two within 256 MiB, at least 64."""
    fits = LOSS_CHUNK_BYTES // (model.vocab_size * (4 + 2 * dtype_bytes))
    return 1 << max(6, min(12, int(math.log2(max(1, fits)))))


def seconds_per_step(
    model: ModelSpec, device: DeviceSpec, mean_tokens: float, supervised_share: float, rows: int, accum: int, keep: int
) -> float | None:
    """Forecast of one optimizer step: frozen weights need 4 operations a parameter and token, 6 recomputed."""
    if not device.matmul_flops:
        return None
    tokens = rows * mean_tokens
    recomputed = 1 - keep / model.n_layers
    attention = 4 * mean_tokens * model.n_heads * model.head_dim * model.n_layers
    per_token = (2 * model.n_linear_params + attention) * (2 + recomputed)
    per_token += 4 * model.vocab_size * model.d_model * supervised_share
    compute = tokens * per_token / (device.matmul_flops * MATMUL_SHARE)
    host = HOST_SECONDS_PER_LAYER * model.n_layers * (1 + recomputed / 3)
    return accum * max(compute, host)
