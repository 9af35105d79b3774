"""A finished run in conversation: base and tuned model answer the same words with the same draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from nbqlora.engine.stream import stream
from nbqlora.memory.host import read_host
from nbqlora.run.result import Run


def answer(
    run: Run,
    messages: Sequence[Mapping[str, str]],
    on_text: Callable[[str], None],
    *,
    tuned: bool,
    seed: int = 0,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
) -> str:
    """The run's model answers, loaded again where its memory was given back.

    Args:
        messages: the conversation, the last by the user.
        on_text: called with the answer so far.
        tuned: False for the base model.
        seed, temperature, max_new_tokens: as in :func:`nbqlora.engine.stream.stream`.

    Raises:
        RunError: no adapter was saved.
    """
    return stream(
        run._loaded(),
        messages,
        on_text,
        use_adapter=tuned,
        seed=seed,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        free_ram_bytes=read_host().free_bytes,
    )
