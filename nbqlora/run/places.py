"""Where a run's files go, and whether they will still be there tomorrow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def default_output_dir(name: str) -> str:
    """``runs/<name>``, relative to where the notebook or shell stands."""
    return str(Path("runs") / name)


def ephemeral_note(output_dir: Path, environ: Mapping[str, str]) -> str:
    """What to say before training about a folder that disappears with its session; ``""`` for one that stays.

    Args:
        output_dir: an absolute path.
        environ: the process's environment; Colab and Kaggle are told by the variables they set.
    """
    if "COLAB_RELEASE_TAG" in environ or "COLAB_GPU" in environ:
        if output_dir.is_relative_to("/content/drive"):
            return ""
        kept = f"/content/drive/MyDrive/{output_dir.name}"
        return f'{output_dir} disappears with this session; mount Drive and write output_dir = "{kept}" to keep it'
    if environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive":
        return f"{output_dir} disappears with this session; Save Version > Save & Run All keeps it"
    if "KAGGLE_KERNEL_RUN_TYPE" in environ and not output_dir.is_relative_to("/kaggle/working"):
        return f"{output_dir} disappears with this session; only /kaggle/working is kept"
    if "BINDER_SERVICE_HOST" in environ or "BINDER_LAUNCH_HOST" in environ:
        return f"{output_dir} disappears with this session; download the folder adapter when the run is done"
    return ""
