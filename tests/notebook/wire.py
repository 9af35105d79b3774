"""What a kernel really sends: each message of a cell with the bytes that went over the socket."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One message.

    Args:
        at: seconds, when it came.
        wire_bytes: all of its frames, header and signature too.
        content_bytes: its content as JSON, which is what a front end keeps.
    """

    kind: str
    content: dict[str, Any]
    at: float
    wire_bytes: int
    content_bytes: int

    @property
    def data(self) -> dict[str, str]:
        return dict(self.content.get("data", {}))

    @property
    def place(self) -> str:
        """The output that it writes to; "" for one that is written once."""
        return str(self.content.get("transient", {}).get("display_id", ""))


def execute(
    client: Any, code: str, *, on_message: Callable[[Sent], None] | None = None, timeout: float = 180
) -> list[Sent]:
    """Run a cell to its end; what it sent."""
    wanted, seen = client.execute(code), []
    socket, until = client.iopub_channel.socket, time.monotonic() + timeout
    while time.monotonic() < until:
        if not socket.poll(1000):
            continue
        frames = socket.recv_multipart()
        message = client.session.deserialize(client.session.feed_identities(frames)[1])
        if message["parent_header"].get("msg_id") != wanted:
            continue
        kind, content = message["msg_type"], message["content"]
        if kind == "status" and content["execution_state"] == "idle":
            return seen
        sent = Sent(
            kind=kind, content=content, at=time.monotonic(), wire_bytes=sum(map(len, frames)),
            content_bytes=len(json.dumps(content, ensure_ascii=False).encode()),
        )  # fmt: skip
        seen.append(sent)
        if on_message is not None:
            on_message(sent)
    raise TimeoutError(f"the cell did not end; its last messages: {seen[-3:]}")


def shown(messages: list[Sent]) -> list[Sent]:
    """What was displayed, and displayed again."""
    return [m for m in messages if m.kind in ("display_data", "update_display_data")]
