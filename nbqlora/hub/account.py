"""Whose token it is, and whether it may write where something is to be published: asked before anything is sent.

The token goes into requests and nowhere else: no message, file or object here holds it but the :class:`Writer` that
is given up with the call.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from nbqlora.core.errors import PublishError
from nbqlora.hub.access import TOKENS, login_advice, token_source
from nbqlora.hub.reach import Answer, answer_of, ask_hub, endpoint, read_token

GIVEN = "the token that was given"


@dataclass(frozen=True, kw_only=True)
class Writer:
    """Who publishes.

    Args:
        repo_id: with its owner.
        source: where the token comes from, in words.
    """

    repo_id: str
    source: str
    token: str = field(repr=False)

    def __reduce__(self) -> Any:
        """Never pickled."""
        raise TypeError("a token is not written anywhere")


def writer(repo_id: str, token: str | None = None, environ: Mapping[str, str] = os.environ) -> Writer:
    """Check name, hub and token, within seconds.

    Args:
        repo_id: ``owner/name``, or a name in the token's own account.
        token: None for the one that ``huggingface_hub`` would send.

    Raises:
        PublishError: the name is none, the hub cannot be reached, or the token is missing, refused, read-only or
            another account's.
    """
    _check_name(repo_id)
    source = GIVEN if token else token_source(environ)
    found = token or read_token()
    if not found:
        raise PublishError(f"publishing {repo_id} needs a token that may write; {login_advice(environ)}")
    answer = ask_hub(found)
    if answer.kind != "ok":
        raise PublishError(refusal(repo_id, source, answer))
    account = _account(found, repo_id, source)
    return Writer(repo_id=_with_owner(repo_id, account), source=source, token=found)


def _check_name(repo_id: str) -> None:
    try:
        hf_hub_url(repo_id, "README.md")  # nothing is asked: the name is looked at
    except HFValidationError:
        hint = "letters, digits, -, _ and . make one, at most 96 in all"
        raise PublishError(f"{repo_id!r} is no name that a hub takes (owner/name); {hint}") from None


def _account(token: str, repo_id: str, source: str) -> Mapping[str, Any]:
    try:
        account = HfApi().whoami(token=token)
    except HfHubHTTPError as error:
        raise PublishError(refusal(repo_id, source, answer_of(error) or Answer(kind="no_hub"))) from None
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise PublishError(f"{source} may only read; make a token that may write: {TOKENS}")
    return dict(account)


def _with_owner(repo_id: str, account: Mapping[str, Any]) -> str:
    name, organizations = str(account["name"]), [str(o["name"]) for o in account.get("orgs") or ()]
    owner, slash, _ = repo_id.partition("/")
    if not slash:
        return f"{name}/{repo_id}"
    if owner in (name, *organizations):
        return repo_id
    others = f" and {', '.join(organizations)}" if organizations else ""
    raise PublishError(f"{owner} is not this token's to publish under: it is the token of {name}{others}; "
                       f'write "{name}/{repo_id.partition("/")[2]}"')  # fmt: skip


def refusal(repo_id: str, source: str, answer: Answer) -> str:
    """What the hub said to publishing, and what to do."""
    said = f": {answer.detail}" if answer.detail else ""
    match answer.kind:
        case "refused_token":
            return f"the hub refuses {_the(source)}{said}; make a new one: {TOKENS}"
        case "gated" | "missing":
            return f"{source} may not write to {repo_id}{said}; make a token that may: {TOKENS}"
        case "offline":
            return f"{repo_id} cannot be published: {answer.detail}; unset it"
        case "busy":
            return f"{endpoint()} cannot take {repo_id} now{said}; try again in a minute"
        case "unreachable":
            return f"{repo_id} cannot be published: {endpoint()} cannot be reached ({answer.detail}); try again later"
        case _ if answer.detail.startswith("it answers"):
            return f"{endpoint()} does not take {repo_id}{said}"
        case _:
            return f"{endpoint()} answers, but not as a hub does{said}; a login page or a proxy in between?"


def _the(source: str) -> str:
    return source if source == GIVEN else f"the token of {source}"
