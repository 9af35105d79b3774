"""Bytes and seconds of one way to run: the arithmetic of a plan.

Bytes are counted tensor by tensor for the path that runs (transformers' layers, PEFT's 4-bit LoRA,
bitsandbytes, our head loss), not fitted to a measurement; what a layer saves is in ``layer``.
"""

from __future__ import annotations

import math

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.plan import MemoryBudget
from nbqlora.core.specs import BatchLayout, DeviceSpec, MemoryCategory, ModelSpec
from nbqlora.core.units import GIB, MIB
from nbqlora.planner.layer import Attention, attention_of, layer_bytes

# NF4 with double quantization: half a byte, one uint8 scale a block of 64, one fp32 scale of 256 scales.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
OPTIMIZER_BYTES = {"adamw_torch_fused": 8, "adamw_torch": 8, "adamw_8bit": 2}
DTYPE_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
# What the allocator cannot use because of its own granularity; the default reserve of a card.
FRAGMENTATION_BYTES = GIB // 2
# Logits of one chunk, with what is made of them.
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
    ragged: bool = True,
    layout: BatchLayout = BatchLayout.PADDED,
) -> MemoryBudget:
    """Predicted bytes at the peak.

    Args:
        row_tokens: tokens of the longest of the ``rows``; all are counted as long.
        n_keep: layers that keep everything; they stand last, and are free again when the others are recomputed.
        ragged: rows differ in length, so a batch of several that is padded is masked too.
        layout: padded, or end to end, where each token's mask is as wide as the whole micro-batch.
    """
    c, tokens = DTYPE_BYTES[dtype], rows * row_tokens
    joined = layout is not BatchLayout.PADDED
    how = attention_of(model, device, rows if ragged or joined else 1, layout)
    n_adapter = adapter_params(model, config)
    kept = _kept_bytes(config, model, device, how, c, tokens, tokens if joined else row_tokens)
    stored = n_keep * kept + (model.n_layers - n_keep) * model.d_model * c * tokens
    stored += _always_stored(config, model, how, c, tokens, tokens if joined else row_tokens)
    loss = _loss_bytes(model, c, supervised_tokens)
    working = _working_bytes(model, how, c, row_tokens, n_keep) * tokens + (0 if n_keep else kept)
    dequant = _dequant_bytes(config, model, c)
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
        m.CONTEXT: device.context_bytes if device.kind == "cpu" else _workspace_bytes(device),
    }
    return MemoryBudget(by_category={k: v for k, v in parts.items() if v})


def _loss_bytes(model: ModelSpec, c: int, supervised_tokens: int) -> int:
    """One chunk of logits, and the hidden states that the loss counts with their gradient."""
    chunk = min(supervised_tokens, loss_chunk_tokens(model))
    return chunk * model.vocab_size * _logit_bytes(model) + supervised_tokens * model.d_model * 2 * c


def _dequant_bytes(config: FinetuneConfig, model: ModelSpec, c: int) -> int:
    """The widest linear, dequantized, with its scales in fp32."""
    if not (config.load_in_4bit or model.quantized):
        return 0
    return int(max((n * k for n, k in model.linear_shapes.values()), default=0) * (c + 4 / 64))


def _workspace_bytes(device: DeviceSpec) -> int:
    """Workspaces of cuBLAS, which torch allocates: one for the forward's thread, one for the backward's.

    torch's defaults are 32 MiB each from capability 9.0, 8.1 below; 64.0 MiB were left on an H100 after a run.
    """
    return 2 * (32 * MIB if (device.capability or (0, 0)) >= (9, 0) else 4096 * 2 * 1024 + 16 * 8 * 1024)


def _kept_bytes(
    config: FinetuneConfig, model: ModelSpec, device: DeviceSpec, how: Attention, c: int, tokens: int, attended: int
) -> int:
    """What one layer that keeps everything holds for a micro-batch of ``tokens``, each over ``attended``."""
    per_token = layer_bytes(
        model,
        c,
        config.lora_r,
        row_tokens=attended,
        attention=how,
        dropout=config.lora_dropout > 0,
        on_cpu=device.kind == "cpu",
    )
    return per_token * tokens


def _always_stored(config: FinetuneConfig, model: ModelSpec, how: Attention, c: int, tokens: int, attended: int) -> int:
    """What no policy changes: embeddings, the last norm and its fp32 input, autocast's adapter, the mask (bool)."""
    stored = (2 * c + 4) * model.d_model * tokens + (adapter_params(model, config) * c if c == 2 else 0)
    return stored + (tokens * attended if how is Attention.MASKED else 0)


def _working_bytes(model: ModelSpec, how: Attention, c: int, row_tokens: int, n_keep: int) -> int:
    """Bytes a token that the backward needs beside what is stored: the larger of its first two moments.

    The last norm: four tensors of the width in fp32; the last layer has not been recomputed yet, if it is.
    The first MLP: the gradients of both factors of its product, when the last norm's tensors are free again.
    Scores that SDPA writes out: three more tensors of them in fp32.
    """
    product = max(0, 2 * model.d_ff * c - (4 + c) * model.d_model)
    scores = 12 * model.n_heads * row_tokens if how is Attention.MATH else 0
    return max((16 if n_keep else 8) * model.d_model, product) + scores


def _logit_bytes(model: ModelSpec) -> int:
    """Bytes of one logit at the loss's peak: in fp32, and its exponential; with a cap, its slope too."""
    return 12 if model.head.logit_softcap else 8


def loss_chunk_tokens(model: ModelSpec) -> int:
    """Supervised tokens whose logits exist at once: a power of two within 256 MiB, from 64 to 4,096."""
    fits = LOSS_CHUNK_BYTES // (model.vocab_size * _logit_bytes(model))
    return 1 << max(6, min(12, int(math.log2(max(1, fits)))))


def seconds_per_step(
    model: ModelSpec, device: DeviceSpec, tokens: float, attended: float, supervised_share: float, accum: int, keep: int
) -> float | None:
    """Forecast of one optimizer step: frozen weights need 4 operations a parameter and token, 6 recomputed.

    Args:
        tokens: of one micro-batch.
        attended: tokens that one row attends over.
        supervised_share: share of the tokens that the loss counts.
        accum: micro-batches in a step.
        keep: layers that are not recomputed.
    """
    if not device.matmul_flops:
        return None
    recomputed = 1 - keep / model.n_layers
    attention = 4 * attended * model.n_heads * model.head_dim * model.n_layers
    per_token = (2 * model.n_linear_params + attention) * (2 + recomputed)
    per_token += 4 * model.vocab_size * model.d_model * supervised_share
    compute = tokens * per_token / (device.matmul_flops * MATMUL_SHARE)
    host = HOST_SECONDS_PER_LAYER * model.n_layers * (1 + recomputed / 3)
    return accum * max(compute, host)
