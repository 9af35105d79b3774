"""Whether the hub can be reached and what it says about a repository: asked once, in seconds.

``huggingface_hub`` retries a request five times, with 23 s of pauses, for every file of a model and with two
lines each time. So one file is asked for first, through that library (its proxies, certificates, endpoint and
token count), in a thread that is given up after :func:`patience_seconds`: a name server that does not answer
cannot be hurried otherwise. The token goes into the request and nowhere else.
"""

from __future__ import annotations

import os
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

PATIENCE_SECONDS = 5.0
RETRY_AFTER_SECONDS = 0.5
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
# A small file that every model has, and one that most data sets have.
ASKED_FOR = {"model": "config.json", "dataset": "README.md"}

Kind = Literal["model", "dataset"]
AnswerKind = Literal[
    "ok", "gated", "refused_token", "missing", "no_file", "bad_name", "busy", "unreachable", "no_hub", "offline"
]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the hub said.

    Args:
        kind: ``gated``: the licence was not accepted, or the token may not read it. ``refused_token``: the token
            itself is wrong. ``missing``: no such repository, or a private one. ``no_file``: it lacks the file
            asked for. ``busy``: an error of the server, or too many requests. ``unreachable``: no answer.
            ``no_hub``: an answer that no hub gives. ``offline``: a variable forbids to ask.
        detail: what was seen, in a few words; never a token.
    """

    kind: AnswerKind
    detail: str = ""

    @property
    def is_from_hub(self) -> bool:
        """The hub answered, whatever it said."""
        return self.kind not in ("unreachable", "no_hub", "offline", "bad_name")


def endpoint() -> str:
    """The hub's address as it may be shown: without a password."""
    parts = urlsplit(constants.ENDPOINT)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def patience_seconds() -> float:
    """How long an answer may take: ``HF_HUB_ETAG_TIMEOUT`` where it is set, else 5 s."""
    return float(constants.HF_HUB_ETAG_TIMEOUT) if os.environ.get("HF_HUB_ETAG_TIMEOUT") else PATIENCE_SECONDS


def ask(name: str, *, kind: Kind = "model") -> Answer:
    """Ask for a repository's config (of a data set, its card); takes :func:`patience_seconds` at most."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if constants.HF_HUB_OFFLINE:
        return offline_answer()
    try:
        url = hf_hub_url(name, ASKED_FOR[kind], repo_type=kind)
    except HFValidationError as error:
        return Answer(kind="bad_name", detail=str(error).partition(":")[0])

    def request(token: str | None) -> Answer:
        commit = get_hf_file_metadata(url, token=token or False, timeout=patience_seconds()).commit_hash
        return Answer(kind="ok") if commit else Answer(kind="no_hub", detail="it names no commit")

    return _answered(request)


def ask_hub(token: str | None = None) -> Answer:
    """Ask whether the hub is there, and whether it takes the token if there is one.

    Args:
        token: the one to try; None for the one that ``huggingface_hub`` would send.
    """
    if constants.HF_HUB_OFFLINE:
        return offline_answer()
    from huggingface_hub import get_session

    def request(token: str | None) -> Answer:
        url = f"{constants.ENDPOINT}/api/whoami-v2" if token else constants.ENDPOINT
        headers = {"authorization": f"Bearer {token}"} if token else {}
        response = get_session().head(url, headers=headers, timeout=patience_seconds(), follow_redirects=True)
        status, host = response.status_code, response.url.host
        if host != urlsplit(url).hostname:
            return Answer(kind="no_hub", detail=f"it sends on to {host}")
        if token and status == 401:
            return Answer(kind="refused_token")
        busy = status == 429 or status >= 500
        return Answer(kind="busy", detail=f"it answers {status}") if busy else Answer(kind="ok")

    return _answered(request, token)


def offline_answer() -> Answer:
    """The libraries were told not to ask."""
    variable = next((v for v in OFFLINE_VARIABLES if os.environ.get(v)), OFFLINE_VARIABLES[0])
    return Answer(kind="offline", detail=f"{variable} = {os.environ.get(variable, '1')} keeps the libraries off it")


def read_token() -> str | None:
    """The token that ``huggingface_hub`` would send; for requests only, never to be shown."""
    from huggingface_hub import get_token

    return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()


def _answered(request: Callable[[str | None], Answer], token: str | None = None) -> Answer:
    # Asked for here: Colab's secrets can be read from the main thread only.
    token = token or read_token()
    if token and not (token.isascii() and token.isprintable()):
        return Answer(kind="refused_token", detail="it holds characters that no token has")
    got: list[Answer | Exception] = []

    def work() -> None:
        try:
            got.append(_twice(request, token))
        except Exception as error:  # raised again below, in the thread that asked
            got.append(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    thread.join(patience_seconds())
    if not got:
        return Answer(kind="unreachable", detail=_no_answer())
    if isinstance(got[0], Answer):
        return got[0]
    answer = answer_of(got[0])
    if answer is None:
        raise got[0]
    return answer


def _twice(request: Callable[[str | None], Answer], token: str | None) -> Answer:
    """A connection that fails at once is tried again, once: names are sometimes not known for a moment."""
    try:
        return request(token)
    except Exception as error:
        if not _is_transport(error) or _timed_out(error):
            raise
    time.sleep(RETRY_AFTER_SECONDS)
    return request(token)


def answer_of(error: BaseException) -> Answer | None:
    """What an error of ``huggingface_hub``, or one caused by it, says; None for any other."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return Answer(kind="gated", detail=_header(cause, "X-Error-Message"))
        if isinstance(cause, RepositoryNotFoundError):
            return Answer(kind="missing")
        if isinstance(cause, HfHubHTTPError):
            return _answer_of_status(cause)
        if _is_transport(cause):
            return Answer(kind="unreachable", detail=_why_unreachable(cause))
        # Not its context: an error that was handled says nothing about the one that came after it.
        cause = cause.__cause__
    return None


def _answer_of_status(error: HfHubHTTPError) -> Answer:
    status, said = error.response.status_code, _header(error, "X-Error-Message")
    if _header(error, "X-Error-Code") == "EntryNotFound":
        return Answer(kind="no_file")
    if status == 401:
        return Answer(kind="refused_token" if "credentials" in said else "missing", detail=said)
    if status == 403:
        return Answer(kind="gated", detail=said)
    if status == 404:
        return Answer(kind="missing", detail=said)
    return Answer(kind="busy" if status == 429 or status >= 500 else "no_hub", detail=f"it answers {status}")


def _header(error: HfHubHTTPError, name: str) -> str:
    return str(error.response.headers.get(name) or "")


def _is_transport(error: BaseException) -> bool:
    """No answer came: httpx's errors, under whichever name ``huggingface_hub`` has it."""
    names = {c.__name__ for c in type(error).__mro__}
    return type(error).__module__.startswith("httpx") and bool(names & {"TransportError", "InvalidURL"})


def _timed_out(error: BaseException) -> bool:
    return isinstance(error, TimeoutError) or "Timeout" in type(error).__name__


def _no_answer() -> str:
    return f"no answer in {patience_seconds():.0f} s, HF_HUB_ETAG_TIMEOUT changes that"


def _why_unreachable(error: BaseException) -> str:
    """A few words for what is at the bottom of it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            is_certificate = isinstance(cause, ssl.SSLCertVerificationError)
            what = "its certificate is not trusted here" if is_certificate else "no TLS connection comes about"
            return f"{what} (a proxy in between?)"
        if isinstance(cause, ConnectionRefusedError):
            return "it refuses the connection"
        if "getaddrinfo" in str(cause) or type(cause).__name__ == "gaierror":
            return "its name is not known"
        if _timed_out(cause):
            return _no_answer()
        cause = cause.__cause__ or cause.__context__
    if type(error).__name__ in ("UnsupportedProtocol", "InvalidURL"):
        return "HF_ENDPOINT must begin with https:// or http://"
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
