"""What a row holds, checked: a conversation, or a prompt and its completion.

Everything that is wrong here would otherwise show as a traceback from inside a chat template, or as rows
that teach nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbqlora.core.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "user", "assistant", "tool")
# How other formats call them.
OTHER_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "ai": "assistant", "model": "assistant"}


def is_missing(value: Any) -> bool:
    """None, or what pandas writes for it."""
    return value is None or type(value).__name__ == "NAType" or (isinstance(value, float) and value != value)


def check_messages(value: Any, where: str) -> list[Message]:
    """The messages of one conversation.

    Args:
        value: a list (or array) of mappings with ``role`` and ``content``.
        where: its name in errors.

    Raises:
        DataError: naming the message that is not one.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise DataError(f"{where}: messages must be a list of {{role, content}}, got {_kind(value)}")
    if not value:
        raise DataError(f"{where}: messages is empty; expected at least one {{role, content}}")
    return [_check_message(message, f"{where}, message {number}") for number, message in enumerate(value, start=1)]


def _check_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise DataError(f"{where}: expected role and content, got {str(message)[:60]!r}")
    role, content = message["role"], message["content"]
    if not isinstance(role, str):
        raise DataError(f"{where}: role must be text, got {_kind(role)}")
    meant = OTHER_ROLES.get(role.lower(), role.lower() if role.lower() in ROLES else role)
    if meant != role:
        raise DataError(f'{where}: the role is "{role}"; write "{meant}"')
    if not isinstance(content, str):
        raise DataError(f"{where}: content must be text, got {_kind(content)}")
    # Tables pad what a message does not have with None; templates ask whether the key is there.
    return {key: given for key, given in message.items() if given is not None}


def check_text(value: Any, where: str) -> str:
    """Text that a tokenizer can take. Raises :class:`DataError`."""
    text = str(value)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise DataError(f"{where}: the text holds half of a character ({half}), as when an emoji is cut") from None
    return text


def _kind(value: Any) -> str:
    return "nothing (None or NaN)" if is_missing(value) else type(value).__name__
