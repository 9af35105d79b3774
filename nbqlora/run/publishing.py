"""A run's result on the hub: what ``hub.publish`` sends, with the report and the curve of the run."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from nbqlora.core.errors import ConfigError, Problem
from nbqlora.core.report import Report
from nbqlora.hub.card import Kind
from nbqlora.hub.publish import publish
from nbqlora.hub.published import Say

KINDS: tuple[str, ...] = get_args(Kind)


def publish_run(
    report: Report,
    folder: Path,
    repo_id: str,
    *,
    kind: str = "adapter",
    private: bool = True,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    say: Say = lambda line: None,
) -> str:
    """Publish the adapter of a run, or what was merged or exported from it; the address that it has there.

    Args:
        folder: of the adapter, of the merged model, or of GGUF files; of those one file will do.
        kind: ``adapter``, ``merged`` or ``gguf``.
        say: takes a line about what is sent otherwise than it lies there.

    Raises:
        ConfigError: ``kind`` is none of the three.
        PublishError, ModelError: as :func:`nbqlora.hub.publish.publish`.
    """
    if kind not in KINDS:
        raise ConfigError([Problem(key="kind", message=f"{kind!r} is none of {', '.join(KINDS)}")], "push_to_hub")
    return publish(
        folder,
        repo_id,
        report=report,
        kind=kind,  # type: ignore[arg-type]
        private=private,
        token=token,
        revision=revision,
        commit_message=commit_message,
        base_model=base_model,
        curve=_curve(report),
        say=say,
    )


def _curve(report: Report) -> bytes | None:
    """Loss and memory over the steps, as PNG; None before the first step."""
    from nbqlora.view.figures import run_figure

    return run_figure(report)._repr_png_() if report.steps else None
