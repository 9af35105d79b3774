"""One answer of a conversation, handed over while it is made.

Sampled answers are repeatable: a seed sets torch's generators for this answer alone, and they go on afterwards as if
nothing had been, so that base and tuned model answer with the same draws and a run that follows is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import TextStreamer

from nbqlora.engine.generate import chat_text, generation_settings, talking
from nbqlora.engine.loaded import LoadedModel

Message = Mapping[str, str]


def stream(
    loaded: LoadedModel,
    messages: Sequence[Message],
    on_text: Callable[[str], None],
    *,
    use_adapter: bool,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    free_ram_bytes: int = 0,
) -> str:
    """Answer the last of the messages.

    Args:
        messages: a conversation, ``role`` and ``content`` each, the last by the user.
        on_text: called with the answer so far, whenever a word of it is complete.
        use_adapter: False for the base model.
        seed: of what is drawn; without meaning at temperature 0.
        temperature: 0 for greedy.
        free_ram_bytes: as in :func:`nbqlora.engine.generate.generate`.

    Returns:
        The whole answer, without special tokens.
    """
    tokenizer = loaded.tokenizer
    text = _rendered(tokenizer, messages)
    ids = tokenizer(text, add_special_tokens=not tokenizer.chat_template, return_tensors="pt")["input_ids"]
    ids = ids.to(loaded.device)
    streamer = _Collected(tokenizer, on_text)
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with (
        talking(loaded, use_adapter=use_adapter, free_ram_bytes=free_ram_bytes),
        torch.random.fork_rng(devices=devices),
    ):
        torch.manual_seed(seed)
        settings = generation_settings(loaded, max_new_tokens, temperature=temperature)
        loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer
        )
    return streamer.text.strip()


def _rendered(tokenizer: Any, messages: Sequence[Message]) -> str:
    if len(messages) == 1 or not tokenizer.chat_template:
        return chat_text(tokenizer, messages[-1]["content"])
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))


class _Collected(TextStreamer):
    def __init__(self, tokenizer: Any, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._on_text = "", on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """More of the answer is certain."""
        self.text += text
        self._on_text(self.text)
