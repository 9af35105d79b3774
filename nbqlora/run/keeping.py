"""The last save of a run and the first load after it: what was learned is not lost to a full disk or a damaged file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nbqlora.core.config import FinetuneConfig
from nbqlora.core.errors import DiskError, DoesNotFitError, OutOfDiskError
from nbqlora.core.plan import Plan, SavedAdapter
from nbqlora.core.units import MIB, format_bytes
from nbqlora.engine.loaded import LoadedModel
from nbqlora.hub.adapter import whole_adapter
from nbqlora.hub.load import load_adapter
from nbqlora.hub.save import adapter_bytes, save_adapter
from nbqlora.memory.device import device_spec
from nbqlora.planner.standing import DTYPE_BYTES, weight_bytes
from nbqlora.run.places import rooms

# Tokenizer, card and list beside the weights.
BESIDE_BYTES = 64 * MIB


def save_somewhere(
    loaded: LoadedModel,
    output_dir: Path,
    base_name: str,
    say: Callable[[str], None],
    environ: Mapping[str, str] = os.environ,
) -> SavedAdapter:
    """Save the adapter in ``output_dir``, or if that disk refuses in another folder of this machine that has room.

    Raises:
        OutOfDiskError, DiskError: no disk takes it; what the first one said.
    """
    try:
        return save_adapter(loaded.model, loaded.tokenizer, output_dir, base_name)
    except (OutOfDiskError, DiskError) as error:
        needed = adapter_bytes(loaded.model) + BESIDE_BYTES
        for room in rooms(output_dir, Path(constants.HF_HUB_CACHE), environ)[1:]:
            if room.free_bytes < needed:
                continue
            folder = Path(room.path) / f"nbqlora-{output_dir.name}"
            try:
                saved = save_adapter(loaded.model, loaded.tokenizer, folder, base_name)
            except (OutOfDiskError, DiskError):
                continue
            say(f"{str(error).splitlines()[0]}; so the adapter is in {saved.path}: copy it to where it stays")
            return saved
        raise


def reload_adapter(config: FinetuneConfig, plan: Plan, location: str, tokenizer: Any, folder: Path) -> LoadedModel:
    """Base and saved adapter, to talk to; of a damaged adapter the copy in a checkpoint, with a warning.

    Raises:
        ModelError: the adapter is damaged, and no checkpoint has a whole one; or the base cannot be read.
        DoesNotFitError: its weights were split over cards, and this one has no room for all of them.
    """
    if plan.shards > 1:
        check_one_card_holds(config, plan, device_spec(".").free_bytes)
    found = whole_adapter(folder)
    if found.note:
        warnings.warn(found.note, stacklevel=4)
    return load_adapter(config, plan, location, tokenizer, found.folder)


def check_one_card_holds(config: FinetuneConfig, plan: Plan, free_bytes: int) -> None:
    """Before a model is loaded to talk that was trained with split weights.

    Raises:
        DoesNotFitError: it needs more than is free, with what can be done.
    """
    needed = weight_bytes(plan.model, replace(config, fsdp=False), DTYPE_BYTES[plan.dtype])
    if needed > free_bytes:
        size, free = format_bytes(needed), format_bytes(free_bytes)
        raise DoesNotFitError(
            f"{plan.model.name} needs {size} to talk, on one card, where {free} are free: it was trained "
            f"with its weights split over {plan.shards}\n"
            "  the adapter is saved: .merge or .push_to_hub do not need the card; talk to it where more is free"
        )
