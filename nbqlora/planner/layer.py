"""What one decoder layer saves for its backward, tensor by tensor.

The path counted is the one that runs: transformers' layers with SDPA, PEFT's 4-bit LoRA, bitsandbytes. The
frozen 4-bit matmul saves no input; LoRA, the norms, attention and the activation do. A test counts what
autograd really saves, family by family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from nbqlora.core.specs import BatchLayout, DeviceSpec, ModelSpec


class Attention(Enum):
    """How attention runs: it follows from the mask, the card and the family."""

    MASKED = "a mask in the dtype"
    CAUSAL = "no mask"
    MATH = "written out by SDPA"


def attention_of(model: ModelSpec, device: DeviceSpec, rows: int, layout: BatchLayout) -> Attention:
    """Several rows, padded or end to end, get a mask, and so do packs.

    A single row gets none, and keys that are not expanded: below capability 8.0 no kernel takes those but the
    one that writes the scores out.
    """
    if layout is BatchLayout.PACKED or rows > 1:
        return Attention.MASKED
    old = device.kind == "cuda" and (device.capability or (8, 0)) < (8, 0)
    return Attention.MATH if old and model.n_kv_heads < model.n_heads else Attention.CAUSAL


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a family's layer differs from Llama's, as far as memory goes.

    Args:
        norms: norms of the layer's width.
        qk_norms: q and k are normed too.
        eager: attention is written out, so its probabilities are saved (no SDPA: capped scores).
        copied: attention's result comes in another order than o reads it, and is saved in both.
    """

    norms: int = 2
    qk_norms: bool = False
    eager: bool = False
    copied: bool = False


LLAMA = Layout()
# How the names of attention's linears begin, in the families of transformers.
_ATTENTION = ("q_", "k_", "v_", "o_", "qkv", "query", "key", "value", "out_proj", "c_attn", "W_pack", "attn")
LAYOUTS = {
    "gemma2": Layout(norms=4, eager=True),
    "gemma3_text": Layout(norms=4, qk_norms=True),
    "phi3": Layout(copied=True),
    "qwen3": Layout(qk_norms=True),
}


def layer_bytes(
    model: ModelSpec,
    dtype_bytes: int,
    lora_r: int,
    *,
    row_tokens: int,
    attention: Attention = Attention.MASKED,
    dropout: bool = False,
    on_cpu: bool = False,
) -> int:
    """Bytes a token that one layer saves when it keeps everything.

    ``d`` is the width, ``a`` the attention's (heads x head_dim), ``f`` the MLP's, ``h`` the heads, ``T`` the
    tokens that a row attends over, ``c`` bytes of the training dtype: the norms' inputs in fp32 and their
    scales (4d + 4 each), what LoRA multiplies (see :func:`_lora_inputs`), each adapter's small product (rc),
    attention (see :func:`_attention`), and gate, its activation and up (3fc).

    Args:
        row_tokens: T: tokens of a row; where rows or packs lie end to end, of all of the micro-batch.
        attention: see :func:`attention_of`.
        dropout: ``lora_dropout`` is above 0.
        on_cpu: half precision on a CPU casts once for each adapter.
    """
    c, layout = dtype_bytes, LAYOUTS.get(model.architecture, LLAMA)
    norms = layout.norms * (4 * model.d_model + 4)
    if layout.qk_norms:
        norms += 4 * (model.n_heads + model.n_kv_heads) * (model.head_dim + 1)
    inputs = _lora_inputs(model, c, layout, dropout, on_cpu)
    small = len(model.linear_shapes) * lora_r * c
    return norms + inputs + small + _attention(model, c, layout, row_tokens, attention) + 3 * model.d_ff * c


def _lora_inputs(model: ModelSpec, c: int, layout: Layout, dropout: bool, on_cpu: bool) -> int:
    """What the A matrices multiply, beyond what is saved anyway.

    q, k and v share one tensor, gate and up another (2dc); down has its own (fc), and o reads attention's
    result. Dropout gives each its own, with its mask (a bool on a card, fp32 noise on a CPU). So does
    autocast on a CPU: PEFT asks whether autocast is on for CUDA, and casts to fp32 what autocast casts back.
    """
    each = sum(k for _, k in model.linear_shapes.values())
    if dropout:
        return each * (c + (4 if on_cpu else 1))
    if on_cpu and c < 4:
        return each * c
    copy = model.n_heads * model.head_dim if layout.copied or layout.eager else 0
    return (2 * model.d_model + model.d_ff + copy) * c


def _attention(model: ModelSpec, c: int, layout: Layout, row_tokens: int, how: Attention) -> int:
    """q, k and v, and what softmax needs. With a mask, k and v are expanded to the width of q (3ac).

    SDPA: the result (ac), its log-sums (4h), and the mask, which it turns from bool into the dtype in every
    layer (Tc). Written out by SDPA: q, k, v and the softmax in fp32 (12a + 4hT), and the result. Written out by
    the family: the tanh of the capped scores (hTc), their softmax in fp32 (4hT) and, in half precision, that
    rounded (hTc).
    """
    width = model.n_heads * model.head_dim
    if layout.eager:
        return 3 * width * c + model.n_heads * row_tokens * (c + 4 + (c if c < 4 else 0))
    if how is Attention.MATH:
        return 12 * width + 4 * model.n_heads * row_tokens + width * c
    if how is Attention.MASKED:
        return 4 * width * c + 4 * model.n_heads + row_tokens * c
    return 2 * (width + model.n_kv_heads * model.head_dim) * c + 4 * model.n_heads


def mlp_params(model: ModelSpec) -> int:
    """Weights of one layer's MLP."""
    return sum(math.prod(shape) for shape in mlp_shapes(model).values())


def mlp_shapes(model: ModelSpec) -> Mapping[str, tuple[int, int]]:
    """The linears of a layer's MLP: those that attention does not have by name."""
    return {n: s for n, s in model.linear_shapes.items() if n != "dense" and not n.startswith(_ATTENTION)}


def mlp_bytes(model: ModelSpec, dtype_bytes: int, lora_r: int, *, dropout: bool = False, on_cpu: bool = False) -> int:
    """Bytes a token of :func:`layer_bytes` that only the MLP's linears and activation save.

    A layer that computes its MLP again keeps the MLP's input in place of these; where adapters share it, it is there
    already.
    """
    c, shapes, f = dtype_bytes, mlp_shapes(model), model.d_ff
    inner = 3 * f * c + len(shapes) * lora_r * c
    each = sum(k for _, k in shapes.values())
    if dropout:
        return inner + each * (c + (4 if on_cpu else 1)) - model.d_model * c
    return inner + (each - model.d_model if on_cpu and c < 4 else f) * c
