"""What a template writes around the contents, for conversations of one sequence of roles.

Conversations with the same roles differ in their contents only. So the template is rendered once with marks
for contents: what stands between the marks is its frame. A row's own rendering must then be the frame with
the row's contents in it (as they are, or stripped), to the last character; where it is, the place of every
content is known, and with it what the loss counts. Where it is not (a template that looks into contents, tool
calls, thoughts), :mod:`nbqlora.data.turns` looks at that row alone.

The picture, for one answer::

    <|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\nHi there<|im_end|>\\n
                      content                              |content |
                                        asked up to here --^ learned         ^-- up to here
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from nbqlora.data.messages import RowError
from nbqlora.data.template import MARK, Chat

Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The template's text around ``n`` contents.

    Args:
        glue: ``n + 1`` texts: before the first content, between any two, after the last.
        answers: for each assistant's message its index, how many characters before its content and how many
            after it are learned with it.
    """

    glue: tuple[str, ...]
    answers: tuple[tuple[int, int, int], ...]

    def place(self, text: str, contents: Sequence[str]) -> list[Span] | None:
        """Where each content stands in ``text``; None unless ``text`` is exactly glue and contents."""
        at, places = len(self.glue[0]), []
        if not text.startswith(self.glue[0]):
            return None
        for content, after in zip(contents, self.glue[1:], strict=True):
            for written in _ways(content):
                end = at + len(written)
                if text.startswith(written, at) and text.startswith(after, end):
                    break
            else:
                return None
            places.append((at, end))
            at = end + len(after)
        return places if at == len(text) else None

    def learned(self, places: Sequence[Span], start: int) -> list[Span]:
        """Spans of the answers with their end tokens, from message ``start`` on."""
        return [(places[i][0] - before, places[i][1] + after) for i, before, after in self.answers if i >= start]


def _ways(content: str) -> tuple[str, ...]:
    """How templates write a content: as it is, or stripped."""
    return tuple(dict.fromkeys((content, content.strip(), content.lstrip(), content.rstrip(), content.strip("\n"))))


def make_frame(chat: Chat, roles: Sequence[str]) -> Frame | None:
    """The frame of conversations with these roles; None where the template gives none."""
    marks = [MARK.format(i) for i in range(len(roles))]
    messages: list[dict[str, Any]] = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
    try:
        text = chat.render(messages)
        if any(text.count(mark) != 1 for mark in marks):
            return None
        places = [(text.index(mark), text.index(mark) + len(mark)) for mark in marks]
        if places != sorted(places):
            return None
        edges = [0, *(edge for place in places for edge in place), len(text)]
        glue = tuple(text[a:b] for a, b in list(pairwise(edges))[::2])
        answers = []
        for i, role in enumerate(roles):
            if role == "assistant":
                begin, end = _begin(chat, messages, i, text, glue[i], places[i][0]), chat.end_of_answer(glue[i + 1])
                if begin is None or not end:
                    return None
                answers.append((i, places[i][0] - begin, end))
    except RowError:
        return None
    return Frame(glue=glue, answers=tuple(answers))


def _begin(chat: Chat, messages: Sequence[dict[str, Any]], i: int, text: str, glue: str, content: int) -> int | None:
    """Where what the assistant writes begins: behind what it is asked with."""
    if not i or not chat.mentions("add_generation_prompt"):
        # Nothing to ask with. A space before the content is left to the answer, whose first token holds it.
        return content - (len(glue) - len(glue.rstrip(" ")))
    asked = chat.render(messages[:i], asks=True)
    return len(asked) if text.startswith(asked) and len(asked) <= content else None
