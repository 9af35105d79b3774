"""An adapter, a merged model or GGUF files on the hub, with a page that tells what they are.

In order: what could be refused is asked first (the folder, the hub, the token, whose repository it is, whether it is
public), within seconds and before anything is sent. A repository that is public already is not written to unless
that was asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from nbqlora.core.errors import PublishError
from nbqlora.core.report import Report
from nbqlora.core.version import __version__
from nbqlora.engine.quiet import quiet_libraries
from nbqlora.hub.account import Writer, refusal, writer
from nbqlora.hub.card import Card, Kind, lora_words
from nbqlora.hub.published import Say, adapter_config, base_of, files_of, staged
from nbqlora.hub.reach import answer_of, endpoint


def publish(
    folder: Path,
    repo_id: str,
    *,
    report: Report | None = None,
    kind: Kind = "adapter",
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    curve: bytes | None = None,
    say: Say = lambda line: None,
) -> str:
    """Put a folder on the hub; the address that it has there.

    Args:
        folder: of the adapter, of the merged model, or of GGUF files; of those one file will do.
        repo_id: ``owner/name``, or a name in the token's own account; made where it is not there yet.
        report: of the run, for the page.
        private: a new repository is nobody else's to see; to one that is public already nothing is sent then.
        token: None for the one that ``huggingface_hub`` finds.
        revision: a branch, made where it is not there yet; None for ``main``.
        base_model: the base's name on the hub; None for the one that was trained on.
        curve: a figure of the loss, as PNG.
        say: takes a line about what is sent otherwise than it lies there.

    Raises:
        PublishError: the folder holds nothing of this kind, or the hub does not take it; with what to do.
        ModelError: the adapter is damaged.
    """
    files = files_of(folder, kind)
    who = writer(repo_id, token)
    base = base_of(folder, kind, report, base_model)
    card = Card(
        kind=kind, repo_id=who.repo_id, base=base.name, base_is_known=base.is_known, has_curve=curve is not None,
        files=[f.name for f in files], lora=lora_words(adapter_config(folder)) if kind == "adapter" else "",
    )  # fmt: skip
    with staged(folder, files, base, card.text(report), curve, say) as stage, _refusals(who):
        _send(stage, who, private, revision, commit_message or f"{kind} of nbqlora {__version__}", say)
    return f"{endpoint()}/{who.repo_id}" + (f"/tree/{revision}" if revision else "")


def _send(stage: Path, who: Writer, private: bool, revision: str | None, message: str, say: Say) -> None:
    api = HfApi()
    api.create_repo(who.repo_id, private=private, exist_ok=True, token=who.token)
    _check_privacy(bool(api.model_info(who.repo_id, token=who.token).private), who, private, say)
    if revision:
        api.create_branch(who.repo_id, branch=revision, exist_ok=True, token=who.token)
    with quiet_libraries(progress_bars=True):
        api.upload_folder(
            repo_id=who.repo_id, folder_path=stage, token=who.token, revision=revision, commit_message=message
        )


def _check_privacy(is_private: bool, who: Writer, private: bool, say: Say) -> None:
    if private and not is_private:
        how = "write private=False to publish into it, or name another one"
        raise PublishError(f"{who.repo_id} is there already and everybody can see it; {how}")
    if is_private and not private:
        say(f"{who.repo_id} is there already and stays private; its settings on the hub change that")


@contextmanager
def _refusals(who: Writer) -> Iterator[None]:
    """Within, what the hub refuses is one line. An address that an error holds may be a signed one: it is dropped."""
    try:
        yield
    except Exception as error:
        if str(error).startswith("Invalid metadata"):
            raise PublishError(f"{who.repo_id}: {' '.join(str(error).split())}; correct the lines on its top") from None
        answer = answer_of(error)
        if answer is None:
            raise
        raise PublishError(refusal(who.repo_id, who.source, answer)) from None
