"""Answers from a loaded model, greedy and in one batch.

On a CPU a 4-bit matmul unpacks its weight for every token: 4.9 tokens/s for the demo model on two cores,
15.7 with the weights unpacked once. So where the RAM is there, generation on a CPU runs on unpacked
weights; they are dropped afterwards. On a card bitsandbytes' small-batch kernel is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from typing import Any

import torch
from torch.nn.functional import linear

from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.engine.sharded import check_whole

# Unpacked weights may take this share of the RAM that is free.
UNPACK_SHARE = 0.5


def chat_text(tokenizer: Any, prompt: str) -> str:
    """The prompt as the model expects it: through the chat template where there is one."""
    if not tokenizer.chat_template:
        return prompt
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def generate(
    loaded: LoadedModel,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    use_adapter: bool = True,
    free_ram_bytes: int = 0,
) -> list[str]:
    """Greedy answers, one a prompt.

    Args:
        prompts: user turns; each starts a conversation of its own.
        use_adapter: False for the base model's answers.
        free_ram_bytes: what is free; on a CPU, weights are unpacked once when half of it holds them.

    Returns:
        The answers' text without special tokens, in the prompts' order.
    """
    if not prompts:
        return []
    ids, mask = _left_padded([chat_text(loaded.tokenizer, p) for p in prompts], loaded)
    with talking(loaded, use_adapter=use_adapter, free_ram_bytes=free_ram_bytes):
        settings = generation_settings(loaded, max_new_tokens)
        out = loaded.model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = loaded.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [a.strip() for a in answers]


@contextmanager
def talking(loaded: LoadedModel, *, use_adapter: bool, free_ram_bytes: int) -> Iterator[None]:
    """Within, the model generates as fast as it can here; afterwards it is as it was.

    Args:
        use_adapter, free_ram_bytes: as in :func:`generate`.

    Raises:
        ModelError: its weights are split over cards.
    """
    model = loaded.model
    check_whole(model)
    training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(quiet_libraries())
            stack.enter_context(autocast(loaded))
            if not use_adapter:
                stack.enter_context(model.disable_adapter())
            if loaded.device.type == "cpu" and unpacked_bytes(model) < UNPACK_SHARE * free_ram_bytes:
                stack.enter_context(unpacked(model))
            yield
    finally:
        model.train(training)


def _pad_id(loaded: LoadedModel) -> int:
    tokenizer = loaded.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def _left_padded(texts: list[str], loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both ``[prompts, longest]``, padded on the left so that answers start together."""
    pad, special = _pad_id(loaded), not loaded.tokenizer.chat_template
    encoded = [loaded.tokenizer(t, add_special_tokens=special)["input_ids"] or [pad] for t in texts]
    longest = max(map(len, encoded))
    ids = torch.tensor([[pad] * (longest - len(e)) + e for e in encoded], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=loaded.device)
    return ids, mask


def generation_settings(loaded: LoadedModel, max_new_tokens: int, *, temperature: float = 0.0) -> Any:
    """Greedy, or above a temperature of 0 sampled from all tokens; where an answer ends is the model's own."""
    from transformers import GenerationConfig

    own = loaded.model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else loaded.tokenizer.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {loaded.tokenizer.eos_token_id}
    return GenerationConfig(
        **({"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}),
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(e for e in ends if e is not None) or None,
        pad_token_id=_pad_id(loaded),
        bos_token_id=own.bos_token_id,
    )


def _packed_linears(model: torch.nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def unpacked_bytes(model: torch.nn.Module) -> int:
    """RAM that the unpacked weights would take."""
    modules = [m for m in _packed_linears(model) if m.weight.quant_state is not None]
    return sum(m.weight.quant_state.shape.numel() * _compute_dtype(m).itemsize for m in modules)


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Within, every 4-bit linear multiplies with a weight that was dequantized once, in its compute dtype."""
    modules = [m for m in _packed_linears(model) if m.weight.quant_state is not None]
    former = [m.__dict__.get("forward") for m in modules]
    try:
        for module in modules:
            module.forward = _plain_forward(_dequantized(module), module.bias)
        yield
    finally:
        for module, own in zip(modules, former, strict=True):
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own


def _compute_dtype(module: Any) -> torch.dtype:
    return module.compute_dtype or module.weight.quant_state.dtype


def _dequantized(module: Any) -> torch.Tensor:
    """``[out_features, in_features]``; a checkpoint stored in 4 bits names the dtype that it was made in."""
    from bitsandbytes.functional import dequantize_4bit

    state = copy(module.weight.quant_state)
    state.dtype = _compute_dtype(module)
    return dequantize_4bit(module.weight.data, state)


def _plain_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        offset = None if bias is None else bias.to(weight.dtype)
        return linear(x.to(weight.dtype), weight, offset).to(x.dtype)

    return forward
