"""From one format's columns to what is rendered: messages, a prompt with its completion, or text.

Each function takes one row with the format's own names, in which an optional column may be absent, and
raises :class:`RowError` where the row cannot be used. The users' rows are left as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nbqlora.data.messages import (
    OTHER_ROLES,
    ROLES,
    RowError,
    as_list,
    check_message,
    check_messages,
    check_order,
    check_text,
    check_tool_calls,
    check_turns,
    is_blank,
    is_missing,
)
from nbqlora.data.source import Row
from nbqlora.data.tools import read_tools

CALL = "function_call"
# Who speaks, as ShareGPT and the formats after it write it.
SPEAKERS = {
    **{role: role for role in ROLES},
    **OTHER_ROLES,
    **dict.fromkeys(("chatgpt", "bing", "bard"), "assistant"),
    **dict.fromkeys(("observation", "function", "function_response"), "tool"),
    CALL: CALL,
}
BOTH = "prompt and completion must both be text, or both lists of messages"


def from_messages(row: Row) -> dict[str, Any]:
    """``messages``, and ``tools`` where the row offers some."""
    return {"messages": check_messages(row["messages"]), **_tools(row)}


def from_prompt(row: Row) -> dict[str, Any]:
    """``prompt`` and ``completion``, both text or both lists of messages, which keep their parting."""
    prompt, completion = row["prompt"], row["completion"]
    empty = [name for name in ("prompt", "completion") if is_missing(row[name])]
    if empty:
        raise RowError(f"nothing (None or NaN) in {' and '.join(empty)}")
    if _is_list(prompt) and _is_list(completion):
        before, after = check_turns(prompt, "prompt"), check_turns(completion, "completion")
        if not any(message["role"] == "assistant" for message in after):
            raise RowError("no assistant turn in completion")
        check_order([*before, *after])
        return {"prompt": before, "completion": after, **_tools(row)}
    if _is_list(prompt) or _is_list(completion):
        raise RowError(BOTH)
    row = {"prompt": check_text(prompt, "prompt"), "completion": check_text(completion, "completion")}
    if is_blank(prompt) and is_blank(completion):
        raise RowError("prompt and completion are empty")
    return row


def from_alpaca(row: Row) -> dict[str, Any]:
    """One question and its answer; ``input`` stands below the instruction, after a blank line."""
    question, given = check_text(row["instruction"], "instruction"), row.get("input")
    if not is_blank(given):
        question = f"{question}\n\n{check_text(given, 'input')}"
    turns = [("user", question), ("assistant", check_text(row["output"], "output"))]
    messages = [*_system(row), *({"role": role, "content": content} for role, content in turns)]
    check_order(messages)
    return {"messages": messages}


def from_sharegpt(row: Row) -> dict[str, Any]:
    """``conversations`` of ``from`` and ``value`` (or ``role`` and ``content``), any number of turns."""
    messages = [*_system(row), *map(_turn, as_list(row["conversations"], "conversations"))]
    check_order(messages)
    return {"messages": messages, **_tools(row)}


def from_text(row: Row) -> dict[str, Any]:
    """``text``, learned as a whole."""
    text = check_text(row["text"])
    if is_blank(text):
        raise RowError("text is empty")
    return {"text": text}


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or hasattr(value, "tolist")


def _system(row: Row) -> list[dict[str, Any]]:
    content = row.get("system")
    return [] if is_blank(content) else [{"role": "system", "content": check_text(content, "system")}]


def _tools(row: Row) -> dict[str, Any]:
    given = row.get("tools")
    tools = [] if is_missing(given) else read_tools(given)
    if tools is None:
        raise RowError("tools is not a list of objects")
    return {"tools": tools} if tools else {}


def _turn(given: Any) -> dict[str, Any]:
    """One turn as a message, checked."""
    if not isinstance(given, Mapping):
        raise RowError("a turn that is not an object with from and value")
    who, what = ("from", "value") if not is_missing(given.get("from")) else ("role", "content")
    speaker = check_text(given.get(who), "from")
    role = SPEAKERS.get(speaker.strip().lower())
    if role is None:
        raise RowError(f'a turn is from "{speaker[:20]}"; expected human, gpt, system, {CALL} or observation')
    if role == CALL:
        return {"role": "assistant", "tool_calls": _calls(check_text(given.get(what), CALL))}
    return check_message({**given, "role": role} if who == "role" else {"role": role, "content": given.get("value")})


def _calls(text: str) -> list[dict[str, Any]]:
    """The call, or calls, that are written as a turn's text."""
    try:
        calls = check_tool_calls(text if text.lstrip().startswith("[") else f"[{text}]")
    except RowError:
        calls = []
    if not calls:
        raise RowError(f"a {CALL} that is not JSON of an object")
    return [call if "function" in call else {"type": "function", "function": call} for call in calls]
