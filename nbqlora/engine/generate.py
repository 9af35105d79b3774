"""Answers from a loaded model, greedy and in one batch.

On a CPU a 4-bit matmul unpacks its weight for every token: 4.9 tokens/s for the demo model on two cores,
15.7 with the weights unpacked once. So where the RAM is there, generation on a CPU runs on unpacked
weights; they are dropped afterwards. On a card bitsandbytes' small-batch kernel is used as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.functional import linear

from nbqlora.engine.loaded import LoadedModel, autocast
from nbqlora.engine.quiet import quiet_libraries

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
    model = loaded.model
    ids, mask = _left_padded([chat_text(loaded.tokenizer, p) for p in prompts], loaded)
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
            settings = _greedy(loaded, max_new_tokens)
            out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    finally:
        model.train(training)
    answers = loaded.tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    return [a.strip() for a in answers]


def _pad_id(loaded: LoadedModel) -> int:
    tokenizer = loaded.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0)


def _left_padded(texts: list[str], loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask, both ``[prompts, longest]``, padded on the left so that answers start together."""
    encoded = [loaded.tokenizer(t, add_special_tokens=not loaded.tokenizer.chat_template)["input_ids"] for t in texts]
    longest = max(map(len, encoded))
    pad = _pad_id(loaded)
    ids = torch.tensor([[pad] * (longest - len(e)) + e for e in encoded], device=loaded.device)
    mask = torch.tensor([[0] * (longest - len(e)) + [1] * len(e) for e in encoded], device=loaded.device)
    return ids, mask


def _greedy(loaded: LoadedModel, max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    own = loaded.model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else loaded.tokenizer.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {loaded.tokenizer.eos_token_id}
    return GenerationConfig(
        do_sample=False,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(e for e in ends if e is not None),
        pad_token_id=_pad_id(loaded),
        bos_token_id=own.bos_token_id,
    )


def _packed_linears(model: torch.nn.Module) -> list[Any]:
    from bitsandbytes.nn import Linear4bit

    return [m for m in model.modules() if isinstance(m, Linear4bit)]


def unpacked_bytes(model: torch.nn.Module) -> int:
    """RAM that the unpacked weights would take."""
    return sum(
        m.weight.quant_state.shape.numel() * m.weight.quant_state.dtype.itemsize
        for m in _packed_linears(model)
        if m.weight.quant_state is not None
    )


@contextmanager
def unpacked(model: torch.nn.Module) -> Iterator[None]:
    """Within, every 4-bit linear multiplies with a weight that was dequantized once."""
    from bitsandbytes.functional import dequantize_4bit

    modules = [m for m in _packed_linears(model) if m.weight.quant_state is not None]
    try:
        for module in modules:
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            module.forward = _plain_forward(weight, module.bias)
        yield
    finally:
        for module in modules:
            module.__dict__.pop("forward", None)


def _plain_forward(weight: torch.Tensor, bias: torch.Tensor | None) -> Any:
    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear(x.to(weight.dtype), weight, None if bias is None else bias.to(weight.dtype))

    return forward
