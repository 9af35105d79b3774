"""Rows -> text, and where in it the loss counts.

Few chat templates mark what the assistant says, so it is found by rendering, and never assumed: the text must
be what the row's contents in the template's frame give (``frames``), or each answer is looked for alone
(``turns``). A row where neither tells exactly is left out with its reason. Checked against templates with
generation markers, and against a table written by hand for the templates of twelve families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbqlora.core.errors import DataError
from nbqlora.data.frames import Frame, Span, make_frame
from nbqlora.data.messages import RowError, check_text
from nbqlora.data.template import NO_TEMPLATE, Chat, Message, starts_with_bos
from nbqlora.data.turns import check_all_said, check_tools, find_answers

_MOST_FRAMES = 1000


@dataclass(frozen=True, kw_only=True)
class Rendered:
    """One row as text.

    Args:
        learned: spans of characters that the loss counts, in order and apart; None for all.
    """

    text: str
    learned: tuple[Span, ...] | None


class Renderer:
    """Rows of one data set -> text, with one tokenizer's template.

    Args:
        tokenizer: a tokenizer of transformers.
        assistant_only_loss: learn the assistant's (or the completion's) text only, else all.
    """

    def __init__(self, tokenizer: Any, *, assistant_only_loss: bool) -> None:
        self._tokenizer, self._only_answers = tokenizer, assistant_only_loss
        self._chat = Chat(tokenizer) if tokenizer.chat_template else None
        self._start = tokenizer.bos_token if starts_with_bos(tokenizer) else ""
        self._end = tokenizer.eos_token or ""
        self._frames: dict[tuple[str, ...], Frame | None] = {}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> list[Rendered | RowError]:
        """Render rows; a row that cannot be used is its :class:`RowError`.

        Args:
            rows: with ``messages`` (and ``tools``), ``prompt`` and ``completion`` (both text, or both
                messages), or ``text``.

        Raises:
            DataError: there are conversations, and the tokenizer has no chat template.
        """
        done: list[Rendered | RowError] = []
        for row in rows:
            try:
                done.append(self._render(row))
            except RowError as error:
                done.append(error)
        return done

    def _render(self, row: Mapping[str, Any]) -> Rendered:
        if "messages" in row:
            return self._chat_text(row["messages"], row.get("tools"), 0)
        if "text" in row:
            return self._plain_text("", row["text"])
        prompt, completion = row["prompt"], row["completion"]
        if isinstance(prompt, str):
            return self._plain_text(prompt, completion)
        return self._chat_text([*prompt, *completion], row.get("tools"), len(prompt))

    def _plain_text(self, prompt: str, completion: str) -> Rendered:
        """Prompt and completion between the tokens that this tokenizer puts around a document."""
        start = "" if prompt.startswith(self._start) else self._start
        before = start + prompt
        end = "" if self._end and completion.endswith(self._end) else self._end
        text = check_text(before + completion + end)
        return Rendered(text=text, learned=((len(before), len(text)),) if self._only_answers else None)

    def _chat_text(self, messages: Sequence[Message], tools: Any, start: int) -> Rendered:
        """Args: start: the first message that may be learned."""
        if self._chat is None:
            raise DataError(NO_TEMPLATE)
        check_tools(self._chat, messages, tools)
        text = check_text(self._chat.render(messages, tools))
        frame = None if tools else self._frame(self._chat, messages)
        places = frame and frame.place(text, [message["content"] for message in messages])
        learned = None
        if frame and places:
            learned = frame.learned(places, start)
        else:
            check_all_said(self._chat, messages, tools)
            if self._only_answers:
                learned = find_answers(self._chat, messages, tools, text, start)
        return Rendered(text=text, learned=tuple(learned) if learned is not None and self._only_answers else None)

    def _frame(self, chat: Chat, messages: Sequence[Message]) -> Frame | None:
        """The frame of these roles; None when messages have more than a role and a content."""
        if any(len(message) != 2 or not isinstance(message.get("content"), str) for message in messages):
            return None
        roles = tuple(message["role"] for message in messages)
        if roles not in self._frames:
            if len(self._frames) == _MOST_FRAMES:
                self._frames.clear()
            self._frames[roles] = make_frame(chat, roles)
        return self._frames[roles]
