"""Where the answers of one conversation stand, when its roles alone do not tell: tool calls, thoughts, rewriting.

For each answer the conversation is rendered again with another text in its place: what follows that text also
follows the answer. Its begin is where the rendering for an answer (with the generation prompt) ends. Templates
that write an earlier turn otherwise than when it was the last (Qwen3 drops its thoughts) have no such prefix;
there the answer begins where the other text did. Whatever is found is checked: it must hold what the row says.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nbqlora.data.frames import Span
from nbqlora.data.messages import RowError
from nbqlora.data.template import MARK, PLAIN, Chat, Message

END_OF_THOUGHT = "</think>"
_MARK = MARK.format("")
_NO_MASK = "or set assistant_only_loss = false"
REWRITES = (
    "the chat template rewrites earlier turns, so the assistant's tokens cannot be told apart; "
    f"keep one answer a conversation, {_NO_MASK}"
)
NO_END = (
    "the chat template writes no special token after an answer, so the model would not learn to end; "
    f'chat_template_path = "{PLAIN}" does, {_NO_MASK}'
)
CHANGED = (
    "the chat template changes what an answer says, so the learned text cannot be checked; "
    f"give another one as chat_template_path, {_NO_MASK}"
)


@dataclass(frozen=True, kw_only=True)
class _Conversation:
    """One row's messages, and the text that its template makes of them."""

    chat: Chat
    messages: Sequence[Message]
    tools: Any
    text: str

    def render(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        return self.chat.render(messages, self.tools, asks=asks)

    def with_message(self, i: int, message: Message) -> str:
        return self.render([*self.messages[:i], message, *self.messages[i + 1 :]])


def find_answers(chat: Chat, messages: Sequence[Message], tools: Any, text: str, start: int) -> list[Span]:
    """Spans of the answers in ``text`` with their end tokens, from message ``start`` on.

    Raises:
        RowError: an answer cannot be told apart, or what was found does not hold what the answer says.
    """
    given = _Conversation(chat=chat, messages=messages, tools=tools, text=text)
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= start]
    return [_find(given, i) for i in answers]


def check_tools(chat: Chat, messages: Sequence[Message], tools: Any) -> None:
    """Raise :class:`RowError` where the template would leave tools, or calls of them, out without a word."""
    if tools and not chat.mentions("tools", tools):
        raise RowError("the chat template has no place for tools")
    if any("tool_calls" in message for message in messages) and not chat.mentions("tool_calls", tools):
        raise RowError("the chat template has no place for tool calls")


def check_all_said(chat: Chat, messages: Sequence[Message], tools: Any) -> None:
    """Raise :class:`RowError` where the template leaves out what somebody says, the assistant aside."""
    others = [i for i, m in enumerate(messages) if m["role"] != "assistant" and str(m.get("content", "")).strip()]
    marked = list(map(dict, messages))
    for i in others:
        marked[i]["content"] = MARK.format(i)
    text = chat.render(marked, tools)
    for i in others:
        if MARK.format(i) not in text:
            raise RowError(f"the chat template leaves out what the {messages[i]['role']} says")


def _find(given: _Conversation, i: int) -> Span:
    message, text = given.messages[i], given.text
    changed, n_changed = _in_other_words(message)
    other = given.with_message(i, changed)
    if other.count(_MARK) < n_changed:
        raise RowError("the chat template leaves out what the assistant says, or a part of it")
    rest = other[other.rindex(_MARK) + len(_MARK) :]
    if message.get("tool_calls"):
        # The arguments' own end (a quote, a bracket) differs from call to call.
        rest = _common_start(rest[::-1], text[::-1])[::-1]
        end = given.chat.end_of_call(rest)
    else:
        end = given.chat.end_of_answer(rest)
    if not text.endswith(rest):
        raise RowError(REWRITES)
    if not end:
        raise RowError(NO_END)
    begin, said = _begin(given, i), len(text) - len(rest)
    _check_said(message, text[begin : said + (end if message.get("tool_calls") else 0)])
    return begin, said + end


def _common_start(a: str, b: str) -> str:
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))]


def _in_other_words(message: Message) -> tuple[dict[str, Any], int]:
    """The message with another content, and other arguments of its calls; and how many texts were replaced."""
    changed = copy.deepcopy(dict(message))
    calls = changed.get("tool_calls") or []
    for call in calls:
        function = call.get("function", call)
        function["arguments"] = f'{{"x": "{_MARK}"}}' if isinstance(function.get("arguments"), str) else {"x": _MARK}
    if calls and not str(changed.get("content", "")).strip():
        return changed, len(calls)
    return {**changed, "content": _MARK}, len(calls) + 1


def _begin(given: _Conversation, i: int) -> int:
    """Where what the assistant writes begins."""
    messages, text = given.messages, given.text
    if not i or not given.chat.mentions("add_generation_prompt", given.tools):
        before = _up_to_content(given, i).rstrip(" ")
        if not text.startswith(before):
            raise RowError(REWRITES)
        return len(before)
    asked = given.render(messages[:i], asks=True)
    if text.startswith(asked):
        return len(asked)
    # Rewritten, or never so: the same turn as the last one shows it.
    asks_after = _common_start(asked, given.render(messages[:i]))
    as_last = given.render(messages[: i + 1])
    if as_last.startswith(asks_after) and not as_last.startswith(asked):
        raise RowError(
            f"the chat template lets an answer begin after {asked[len(asks_after) :]!r}, and this one does not; "
            f"put what is missing into its content, {_NO_MASK}"
        )
    before = _up_to_content(given, i)
    if not text.startswith(before):
        raise RowError(REWRITES)
    return len(before)


def _up_to_content(given: _Conversation, i: int) -> str:
    """What the template writes before a plain answer in this place."""
    return given.with_message(i, {"role": "assistant", "content": _MARK}).partition(_MARK)[0]


def _check_said(message: Message, found: str) -> None:
    """Raise :class:`RowError` unless the text found is what the message says."""
    said, calls = str(message.get("content", "")).strip(), message.get("tool_calls") or []
    after_thought = said.rpartition(END_OF_THOUGHT)[2].strip()
    if calls:
        names = [str(call.get("function", call).get("name", "")) for call in calls]
        same = after_thought in found and all(name in found for name in names)
    else:
        same = found.rstrip().endswith((said, after_thought))
    if not same:
        raise RowError(CHANGED)
