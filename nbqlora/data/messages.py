"""What one row holds, checked: a conversation, or text.

Everything that is wrong here would otherwise show as a traceback from inside a chat template, or as rows
that teach nothing. It is wrong with one row, not with the file: a :class:`RowError` has a reason without
row number, the same for the same kind of problem, so that such rows can be counted, shown and left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nbqlora.data.tools import read_tool_calls, without_missing

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# How other formats call them.
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant"}
NO_ANSWER = "no assistant turn"


class RowError(Exception):
    """Why one row cannot be used.

    Args:
        reason: for a count of rows: without row number, the same text for the same kind of problem.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def is_missing(value: Any) -> bool:
    """None, or what pandas writes for it."""
    return (
        value is None or (isinstance(value, float) and value != value) or type(value).__name__ in ("NAType", "NaTType")
    )


def is_blank(value: Any) -> bool:
    """Nothing, or text without a letter."""
    return is_missing(value) or (isinstance(value, str) and (not value or value.isspace()))


def check_text(value: Any, name: str = "text") -> str:
    """The text, as a tokenizer can take it.

    Args:
        name: the column, for the reason.

    Raises:
        RowError: it is missing, no text, or holds half of a character.
    """
    if not isinstance(value, str):
        raise RowError(_no_text(value, name))
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise RowError(f"{name} holds half of a character, as when an emoji is cut") from None
    return value


def check_messages(value: Any) -> list[dict[str, Any]]:
    """The messages of one conversation, in an order that can be learned from.

    Args:
        value: a list (or array, or JSON text of a list) of mappings with ``role`` and ``content``; an
            assistant's message may have ``tool_calls`` in place of content.

    Returns:
        Copies without the keys that a table padded with None: templates ask whether a key is there.

    Raises:
        RowError: a message is not one, the roles are out of order, or no assistant speaks.
    """
    messages = check_turns(value)
    check_order(messages)
    return messages


def check_turns(value: Any, name: str = "messages") -> list[dict[str, Any]]:
    """The messages one by one, whatever their order. Raises :class:`RowError`."""
    return [check_message(message) for message in as_list(value, name)]


def as_list(value: Any, name: str = "messages") -> Sequence[Any]:
    """A list of turns from a list, an array or JSON text. Raises :class:`RowError`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise RowError(f"{name} is text, not a list (a CSV file can hold messages only as JSON)") from None
    elif hasattr(value, "tolist"):
        value = value.tolist()
    if is_missing(value):
        raise RowError(f"nothing (None or NaN) in {name}")
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError(f"{name} is {type(value).__name__}, not a list of {{role, content}}")
    if not value:
        raise RowError(f"{name} is empty")
    return value


def check_order(messages: Sequence[Message]) -> None:
    """At most one system message, at the start; the assistant speaks, and not before all others.

    Whether turns must alternate is the chat template's matter.

    Raises:
        RowError: they are out of order, or all of them are empty.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise RowError(NO_ANSWER)
    if "system" in roles[1:]:
        several = roles.count("system") > 1
        raise RowError("more than one system message" if several else "a system message that is not the first")
    if set(roles[: _last(roles, "assistant")]) <= {"assistant"}:
        raise RowError("no turn before the assistant's")
    if all(is_blank(message.get("content")) and "tool_calls" not in message for message in messages):
        raise RowError("every message is empty")


def _last(roles: Sequence[str], role: str) -> int:
    return max(i for i, each in enumerate(roles) if each == role)


def check_message(given: Any) -> dict[str, Any]:
    """One message, a copy without missing keys. Raises :class:`RowError`."""
    if not isinstance(given, Mapping):
        raise RowError("a message that is not an object with role and content")
    if "role" not in given:
        raise RowError("a message without role")
    role, content = given["role"], given.get("content")
    _check_role(role)
    calls = check_tool_calls(given["tool_calls"]) if "tool_calls" in given else []
    if not (calls and role == "assistant" and is_missing(content)):
        check_text(content, "content")
    if len(given) == 2 and not calls:
        return dict(given)
    message = {str(k): without_missing(v) for k, v in given.items() if k != "tool_calls" and not is_missing(v)}
    return {**message, "tool_calls": calls} if calls else message


def check_tool_calls(value: Any) -> list[dict[str, Any]]:
    """Calls from a list or JSON text; empty for nothing. Raises :class:`RowError`."""
    calls = [] if is_missing(value) else read_tool_calls(value)
    if calls is None:
        raise RowError("tool_calls is not a list of objects")
    return calls


def _check_role(role: Any) -> None:
    if role in ROLES:
        return
    if not isinstance(role, str):
        raise RowError(_no_text(role, "role"))
    meant = meant_role(role)
    if meant != role:
        raise RowError(f'the role is "{role}"; write "{meant}"')


def meant_role(role: str) -> str:
    """The role as templates spell it; one that is not known stays as it is."""
    lower = role.strip().lower()
    return OTHER_ROLES.get(lower, lower if lower in ROLES else role)


def _no_text(value: Any, name: str) -> str:
    return f"nothing (None or NaN) in {name}" if is_missing(value) else f"{name} is {type(value).__name__}, not text"
