"""One decoder layer tried both ways: transformers' forward and ours, on a few random tokens.

A table of families can be wrong, and transformers changes; a comparison cannot. Output, gradient of the input and
gradients of the adapters are compared, as norms of differences. Nothing of it stays on the model.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import torch

from nbqlora.engine.attention import AttentionKind, Documents
from nbqlora.engine.layer import Call, Layer
from nbqlora.engine.layer_backward import layer_backward
from nbqlora.engine.layer_forward import layer_forward

# A multiple of 16: Triton compiles another kernel for other sizes, and this way the first step finds its own compiled.
PROBE_TOKENS = 16
# Largest difference as a share of the norm. Two orders of rounding in half precision: transformers rounds between
# steps that are one step here.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def differs(layer: Layer, module: Any, decoder: Any, dtype: torch.dtype) -> str:
    """What is different, in words; "" where nothing is.

    Args:
        layer: read off ``module``; its adapters' flat buffers exist.
        decoder: the model's decoder, for its rotary positions.
        dtype: of the layer's arithmetic.
    """
    training = module.training
    module.eval()
    try:
        return _compare(layer, module, decoder, dtype)
    finally:
        module.train(training)


def _compare(layer: Layer, module: Any, decoder: Any, dtype: torch.dtype) -> str:
    device = layer.scratch.arena.device
    numbers = torch.Generator().manual_seed(0)
    shape = (1, PROBE_TOKENS, layer.o.n_out)
    x, gradient = (torch.randn(shape, generator=numbers).to(device, dtype) for _ in range(2))
    positions = _positions(module, decoder, x)
    try:
        stock = _stock(module, layer, x, gradient, positions, dtype)
    except Exception as error:
        return f"its own forward could not be tried: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    kind = AttentionKind.MATH if layer.heads.softcap else AttentionKind.SDPA
    ours = through_ours(layer, x, gradient, positions, kind)
    for name, expected in stock.items():
        expected = expected.detach()
        off = float((ours[name].float() - expected.float()).norm() / expected.float().norm().clamp(min=1e-20))
        if not off <= TOLERANCE[dtype]:
            return f"its {name} differs from transformers' own by {off:.1%} on a probe"
    return ""


def _positions(module: Any, decoder: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary positions of this layer; some models have several kinds."""
    ids = torch.arange(x.shape[1], device=x.device)[None]
    kinds, index = getattr(decoder.config, "layer_types", None), getattr(module.self_attn, "layer_idx", None)
    by_kind = "layer_type" in signature(decoder.rotary_emb.forward).parameters
    if by_kind and kinds is not None and index is not None:
        cos, sin = decoder.rotary_emb(x, ids, kinds[index])
    else:
        cos, sin = decoder.rotary_emb(x, ids)
    return cos, sin


def _stock(
    module: Any,
    layer: Layer,
    x: torch.Tensor,
    gradient: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    n = x.shape[1]
    future = torch.full((n, n), torch.finfo(dtype).min, dtype=dtype, device=x.device).triu(1)[None, None]
    read = x.clone().requires_grad_()
    on = torch.autocast(x.device.type, dtype=dtype, enabled=dtype != torch.float32)
    with torch.enable_grad(), on:
        out = module(
            read,
            attention_mask=future,
            position_ids=torch.arange(n, device=x.device)[None],
            position_embeddings=positions,
            past_key_values=None,
            use_cache=False,
        )
        found = torch.autograd.grad(out, [read, *layer.parameters], gradient)
    return _named(layer, out, found[0], found[1:])


def through_ours(
    layer: Layer,
    x: torch.Tensor,
    gradient: torch.Tensor,
    positions: tuple[torch.Tensor, torch.Tensor],
    attention: AttentionKind,
    lengths: tuple[int, ...] | None = None,
) -> dict[str, torch.Tensor]:
    """The layer's output, the gradient of its input and those of its adapters; adapters' own gradients stay.

    Args:
        x, gradient: ``[1, tokens, d_model]``.
        positions: cos and sin, ``[1, tokens, rotated dims]``.
        lengths: of the documents that the tokens are; None for one.
    """
    cos, sin = (p.to(x.dtype).reshape(-1, p.shape[-1]) for p in positions)
    documents = documents_of(x, lengths or (x.shape[1],))
    call = Call(documents=documents, cos=cos, sin=sin, attention=attention)
    adapters = layer.scratch.adapters
    before = [p.grad for p in layer.parameters]
    with torch.no_grad():
        if adapters is not None:
            adapters.drop_gradients()
        out, kept = layer_forward(layer, x[0], call)
        d_input = layer_backward(layer, gradient[0], kept, call, need_input=True)
        found = [adapters.gradient_of(p).clone() for p in layer.parameters] if adapters is not None else []
        if adapters is not None:
            adapters.drop_gradients()
    for p, grad in zip(layer.parameters, before, strict=True):
        p.grad = grad
    assert d_input is not None
    return _named(layer, out[None], d_input[None], found)


def documents_of(x: torch.Tensor, lengths: tuple[int, ...]) -> Documents:
    """Of these lengths, end to end in the one row of ``x`` ``[1, tokens, ...]``."""
    edges = torch.tensor([0, *lengths], dtype=torch.int32, device=x.device).cumsum(0, dtype=torch.int32)
    cu_seqlens = edges if len(lengths) > 1 else None
    return Documents(rows=1, seq=x.shape[1], cu_seqlens=cu_seqlens, max_tokens=max(lengths), lengths=lengths)


def _named(layer: Layer, out: Any, d_input: torch.Tensor, gradients: Any) -> dict[str, torch.Tensor]:
    names = [f"gradient of {p.name}'s adapter" for g in layer.groups for p in g.projections if p.lora]
    n_a = [len(g.a_parameters) for g in layer.groups]
    named, at = {"output": out[0] if isinstance(out, tuple) else out, "gradient": d_input}, 0
    begin = 0
    for n in n_a:
        for i in range(n):
            pair = torch.cat([gradients[at + i].flatten(), gradients[at + n + i].flatten()])
            named[names[begin + i]] = pair
        at, begin = at + 2 * n, begin + n
    return named
