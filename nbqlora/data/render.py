"""One row -> token ids and labels, with the loss on exactly the assistant's tokens.

Few chat templates mark what the assistant says, so it is found by rendering: for each assistant turn the
conversation is rendered up to the turn (with the generation prompt) and through it. Both must be prefixes
of the whole; then the turn's text is known to the character, and the whole is tokenized once, with
offsets. A template that rewrites history fails this check and is an error, not a guess. Checked against
templates with generation markers: equal on 22 of 22 conversations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.rows import ACCEPTED

IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class EncodedRow:
    """``labels[i]`` is ``input_ids[i]`` where the loss counts, else -100; both ``[seq]``."""

    input_ids: list[int]
    labels: list[int]

    @property
    def n_supervised(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED for label in self.labels)


def encode_row(row: Mapping[str, Any], tokenizer: Any, *, assistant_only_loss: bool, where: str) -> EncodedRow:
    """Tokenize one row.

    Args:
        row: with ``messages``, or ``prompt`` and ``completion`` (both text, or both lists of messages).
        tokenizer: a fast tokenizer of transformers.
        assistant_only_loss: loss on the assistant's (or the completion's) tokens only, else on all.
        where: the row's name in errors ("row 12 of rows.jsonl").

    Raises:
        DataError: the row has neither form, or its template cannot be followed.
    """
    if row.get("messages") is not None:
        text, spans = _chat_text(_messages(row["messages"], where), 0, tokenizer, where)
    elif row.get("prompt") is not None and row.get("completion") is not None:
        text, spans = _prompt_text(row["prompt"], row["completion"], tokenizer, where)
    else:
        raise DataError(f"{where} has the columns {', '.join(map(str, row)) or '(none)'}; {ACCEPTED}")
    return _tokenize(text, spans if assistant_only_loss else [(0, len(text))], tokenizer)


def _messages(value: Any, where: str) -> list[Mapping[str, Any]]:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {type(value).__name__}")
    for number, message in enumerate(value, start=1):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise DataError(f"{where}, message {number}: expected role and content, got {str(message)[:60]!r}")
        if not isinstance(message["content"], str):
            kind = type(message["content"]).__name__
            raise DataError(f"{where}, message {number}: content must be text, got {kind}")
    return [dict(m) for m in value]


def _prompt_text(prompt: Any, completion: Any, tokenizer: Any, where: str) -> tuple[str, list[tuple[int, int]]]:
    if isinstance(prompt, str) and isinstance(completion, str):
        end = tokenizer.eos_token or ""
        text = prompt + completion + ("" if end and completion.endswith(end) else end)
        return text, [(len(prompt), len(text))]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise DataError(f"{where}: prompt and completion must both be text, or both lists of messages")
    first, rest = _messages(prompt, where), _messages(completion, where)
    return _chat_text([*first, *rest], len(first), tokenizer, where)


def _chat_text(
    messages: list[Mapping[str, Any]], start: int, tokenizer: Any, where: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and the spans of its assistant turns from message ``start`` on."""
    full = _render(messages, tokenizer, where)
    spans = []
    for i, message in enumerate(messages):
        if i < start or message["role"] != "assistant":
            continue
        before = _render(messages[:i], tokenizer, where, add_generation_prompt=True)
        through = _render(messages[: i + 1], tokenizer, where)
        if not (full.startswith(before) and full.startswith(through) and len(before) <= len(through)):
            raise DataError(
                f"{where}, message {i + 1}: this tokenizer's chat template rewrites earlier turns, so the assistant's "
                "tokens cannot be told apart; keep one answer a conversation, or set assistant_only_loss = false"
            )
        # The line break that many templates put after the end token belongs to the next turn.
        spans.append((len(before), len(before) + len(full[len(before) : len(through)].rstrip("\n"))))
    return full, spans


def _render(messages: list[Mapping[str, Any]], tokenizer: Any, where: str, add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
    except TemplateError as error:
        raise DataError(f"{where}: the chat template refuses this conversation: {error}") from error


def _tokenize(text: str, spans: list[tuple[int, int]], tokenizer: Any) -> EncodedRow:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False)
    ids = list(encoded["input_ids"])
    labels = [IGNORED] * len(ids)
    starts = iter(spans)
    span = next(starts, None)
    for i, (begin, end) in enumerate(encoded["offset_mapping"]):
        while span is not None and begin >= span[1]:
            span = next(starts, None)
        if span is None:
            break
        # Nothing predicts a row's first token, so it never counts.
        if i and end > begin >= span[0] and end <= span[1]:
            labels[i] = ids[i]
    return EncodedRow(input_ids=ids, labels=labels)


def check_tokenizer(tokenizer: Any, has_messages: bool) -> None:
    """Raise :class:`DataError` when this tokenizer cannot give exact loss masks."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError("this model has only a slow tokenizer, which gives no character offsets for the loss mask")
    if has_messages and not tokenizer.chat_template:
        raise DataError("this model's tokenizer has no chat template; give rows with prompt and completion as text")
